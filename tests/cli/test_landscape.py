"""`sap-fast landscape`: every direction measured once, gone on with, and shown."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sap_fast.cli import landscape as command
from sap_fast.cli.landscape import LandscapeSettings
from sap_fast.cli.models import load_model
from sap_fast.reports.landscape import landscape_table
from tests.cli.terminal import Terminal
from tests.tiny import norm_of, tiny_llama


def test_steps_hold_the_model_and_the_base() -> None:
    settings = LandscapeSettings("m", "h", "o", reach=0.4, gradient_reach=0.02, points=5)
    assert settings.alphas("random 0") == pytest.approx([-0.4, -0.2, 0.0, 0.2, 0.4])
    assert settings.alphas("safety gradient") == pytest.approx([-0.02, -0.01, 0.0, 0.01, 0.02])
    assert settings.alphas("fine-tuning") == pytest.approx([-1.4, -1.0, -0.5, 0.0, 0.4])
    for name in ("random 0", "fine-tuning"):
        assert 0.0 in LandscapeSettings("m", "h", "o", reach=0.3, points=11).alphas(name)


class Watched:
    """Answers by how far the weights are from where they started, and remembers it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
        #: What of its own norm the parameter moved that moved most, and how far all went together.
        self.moves: list[float] = []
        self.lengths: list[float] = []
        self.fail_after: int | None = None
        self.start = weights_of(model)
        monkeypatch.setattr(command, "generate_openings", self)

    def __call__(self, model: nn.Module, *_: Any, **__: Any) -> list[str]:
        if len(self.moves) == self.fail_after:
            raise KeyboardInterrupt
        weights = [parameter.detach() for parameter in model.parameters()]
        moved = [(w - s).norm() / s.norm() for w, s in zip(weights, self.start, strict=True)]
        self.moves.append(round(float(torch.stack(moved).max()), 5))
        self.lengths.append(norm_of([w - s for w, s in zip(weights, self.start, strict=True)]))
        return ["I cannot", "Sure", "I cannot" if self.moves[-1] < 0.4 else "Sure"]


def weights_of(path: Path) -> list[Tensor]:
    return [p.detach().clone() for p in load_model(str(path), "fp32")[0].parameters()]


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch, chat_model: Path) -> Watched:
    return Watched(monkeypatch, chat_model)


def rows_of(output: Path) -> list[dict[str, str]]:
    with (output / "landscape.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_direction_is_measured_and_shown(
    terminal: Terminal,
    tmp_path: Path,
    watched: Watched,
) -> None:
    output = tmp_path / "land"
    base = tmp_path / "base"
    model, tokenizer = load_model(str(terminal.chat_model), "fp32")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 0.8
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    arguments = terminal.command("landscape", output, "--base", str(base))
    assert terminal.run(*arguments) == 0, terminal.shown
    rows = rows_of(output)
    steps = {name: 3 for name in ("random 0", "random 1", "safety gradient")} | {"fine-tuning": 4}
    counted = {name: sum(row["direction"] == name for row in rows) for name in steps}
    assert counted == steps and len(rows) == 13
    # The model itself is asked once; a step α moves every parameter by α of its norm at random,
    # and all together by α of theirs along the gradient.
    assert watched.moves.count(0.0) == 1
    assert watched.moves[:5] + watched.moves[7:] == [0.5, 0.0, 0.5, 0.5, 0.5, 0.3, 0.2, 0.1]
    assert min(watched.moves[5:7]) > 1.5e-4  # some of them by more
    assert watched.lengths[5:7] == pytest.approx([1e-4 * norm_of(watched.start)] * 2, rel=1e-2)
    for row in rows:
        near = float(row["alpha"]) == 0 or not row["direction"].startswith("random")
        assert float(row["refused_harmful"]) == pytest.approx(2 / 3 if near else 1 / 3)
        assert float(row["task_loss"]) > 0
    page = (output / "landscape.html").read_text()
    assert page.count("<figure>") == 3 and "VISAGE" in page
    assert "VISAGE" in str(landscape_table(command_rows(output)).columns[0]._cells)
    assert not list(tmp_path.glob("*.unfinished"))


def command_rows(output: Path) -> list[dict[str, Any]]:
    return [
        {name: text if name == "direction" else float(text) for name, text in row.items()}
        for row in rows_of(output)
    ]


def test_an_interrupted_landscape_goes_on_where_it_stopped(
    terminal: Terminal,
    tmp_path: Path,
    watched: Watched,
) -> None:
    through = tmp_path / "through"
    assert terminal.run(*terminal.command("landscape", through)) == 0, terminal.shown
    expected, watched.moves = len(watched.moves), []
    output = tmp_path / "land"
    watched.fail_after = 4
    assert terminal.run(*terminal.command("landscape", output)) != 0
    assert not output.exists()
    line = terminal.run(*terminal.command("landscape", output, "--seed", "9"))
    # A write that was cut off in the middle of a row.
    with (tmp_path / "land.unfinished" / "landscape.csv").open("a") as file:
        file.write("random 1,0.5,0.3")
    assert line == 2 and "seed: 0 then, 9 now" in terminal.shown.replace("\n", " ")
    watched.fail_after = None
    assert terminal.run(*terminal.command("landscape", output)) == 0, terminal.shown
    assert len(watched.moves) == expected
    # A direction that went to and fro is itself to rounding; one drawn anew is exact.
    for row, wanted in zip(command_rows(output), command_rows(through), strict=True):
        assert row.pop("direction") == wanted.pop("direction")
        assert row == pytest.approx(wanted, rel=1e-6)


def test_a_base_of_another_shape_is_one_line(terminal: Terminal, tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_llama(layers=2).save_pretrained(base)
    load_model(str(terminal.chat_model), "fp32")[1].save_pretrained(base)
    line = terminal.refusal(*terminal.command("landscape", tmp_path / "o", "--base", str(base)))
    assert f"--base {base}: its parameters are not those of" in line
