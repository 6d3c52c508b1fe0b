"""The safety landscape: where the weights go, that they come back, and the command around it."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sap_fast.cli import landscape as command
from sap_fast.cli.landscape import LandscapeSettings, landscape_table
from sap_fast.cli.models import load_model
from sap_fast.evaluation.landscape import (
    along,
    as_long_as,
    normalized,
    random_direction,
    visage,
)
from tests.conftest import Terminal
from tests.tiny import tiny_llama


@pytest.fixture
def parameters() -> list[Tensor]:
    return [p.detach() for p in tiny_llama(layers=2).parameters()]


def copies(parameters: list[Tensor]) -> list[Tensor]:
    return [parameter.clone() for parameter in parameters]


def assert_same_bits(left: list[Tensor], right: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


# ---- directions ----


def test_a_direction_has_the_norm_of_every_parameter_and_follows_from_its_seed(
    parameters: list[Tensor],
) -> None:
    parameters.append(torch.zeros(3))
    direction = random_direction(parameters, seed=1)
    for moved, parameter in zip(direction, parameters, strict=True):
        assert moved.shape == parameter.shape
        torch.testing.assert_close(moved.norm(), parameter.norm())
    assert_same_bits(direction, random_direction(parameters, seed=1))
    other = random_direction(parameters, seed=2)
    assert torch.cosine_similarity(direction[0].flatten(), other[0].flatten(), dim=0).abs() < 0.1


@pytest.mark.parametrize("scale", [normalized, as_long_as])
def test_a_tensor_of_zeros_stays_one(scale: Any, parameters: list[Tensor]) -> None:
    zeros = [torch.zeros_like(parameter) for parameter in parameters]
    assert not any(moved.any() for moved in scale(zeros, parameters))


def test_a_gradient_is_scaled_as_a_whole(parameters: list[Tensor]) -> None:
    gradient = [torch.randn_like(parameter) * k for k, parameter in enumerate(parameters)]
    scaled = as_long_as(copies(gradient), parameters)
    one, all_of_it, weights = (
        torch.cat([tensor.flatten() for tensor in tensors])
        for tensors in (scaled, gradient, parameters)
    )
    torch.testing.assert_close(one.norm(), weights.norm())
    torch.testing.assert_close(one / one.norm(), all_of_it / all_of_it.norm())


# ---- walking ----


def test_weights_are_where_a_step_leads_and_come_back_bit_for_bit(
    parameters: list[Tensor],
) -> None:
    before, direction = copies(parameters), random_direction(parameters, seed=0)
    wanted = copies(direction)
    addresses = [parameter.data_ptr() for parameter in parameters]

    def measure(alpha: float) -> float:
        for parameter, start, moved in zip(parameters, before, wanted, strict=True):
            if alpha == 0:
                assert torch.equal(parameter, start)
            torch.testing.assert_close(parameter, start + alpha * moved, rtol=1e-5, atol=1e-6)
        return 2 * alpha

    alphas = [-0.5, -0.1, 0.0, 0.01, 0.5]
    assert along(parameters, direction, alphas, measure) == [2 * alpha for alpha in alphas]
    assert_same_bits(parameters, before)
    # In place: nothing that holds the weights has to be told.
    assert [parameter.data_ptr() for parameter in parameters] == addresses


@pytest.mark.parametrize(("alpha", "error"), [(1e-2, 1e-5), (1e-4, 1e-3)])
def test_a_direction_comes_back_to_what_the_docstring_says(
    parameters: list[Tensor], alpha: float, error: float
) -> None:
    direction = random_direction(parameters, seed=0)
    before = copies(direction)
    along(parameters, direction, [alpha], lambda _: None)
    drift = norm_of([a - b for a, b in zip(direction, before, strict=True)])
    assert 0 < drift < error * norm_of(before)


def test_weights_come_back_when_measuring_fails(parameters: list[Tensor]) -> None:
    before = copies(parameters)

    def fail(alpha: float) -> None:
        assert not torch.equal(parameters[0], before[0])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        along(parameters, random_direction(parameters, seed=0), [0.3], fail)
    assert_same_bits(parameters, before)


def test_visage_is_the_mean_over_the_landscape() -> None:
    volume = visage([[0.0, 1.0, 0.5], [0.0, 0.6, 0.0]])
    assert volume.mean == pytest.approx(0.35) and volume.count == 2
    assert volume.low == pytest.approx(0.2) and volume.high == pytest.approx(0.5)


def test_steps_hold_the_model_and_the_base() -> None:
    settings = LandscapeSettings("m", "h", "o", reach=0.4, gradient_reach=0.02, points=5)
    assert settings.alphas("random 0") == pytest.approx([-0.4, -0.2, 0.0, 0.2, 0.4])
    assert settings.alphas("safety gradient") == pytest.approx([-0.02, -0.01, 0.0, 0.01, 0.02])
    assert settings.alphas("fine-tuning") == pytest.approx([-1.4, -1.0, -0.5, 0.0, 0.4])
    for name in ("random 0", "fine-tuning"):
        assert 0.0 in LandscapeSettings("m", "h", "o", reach=0.3, points=11).alphas(name)


# ---- the command ----


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


def norm_of(tensors: list[Tensor]) -> float:
    return float(torch.cat([tensor.flatten() for tensor in tensors]).norm())


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
