"""`--eval`, `--eval-every`, `--keep-best` and `--report-to` of `sap-fast finetune`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sap_fast.cli import finetune as finetune_module
from sap_fast.cli.looks import requests_to_look_at
from sap_fast.data import Request, builtin_requests
from tests.cli.terminal import Terminal


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def scripted(terminal: Terminal, looks: dict[int, tuple[float, float]]) -> list[Any]:
    """Puts (loss, share refused) in the place of what looks measure; returns what was asked."""
    asked: list[Any] = []

    def evaluate(model: Any, tokenizer: Any, **given: Any) -> Any:
        loss, refused = list(looks.values())[len(asked)]
        asked.append(given)
        share = SimpleNamespace(mean=refused)
        return SimpleNamespace(
            task_loss=loss, refused_harmful=share, refused_harmless=share, margin=share
        )

    terminal.monkeypatch.setattr("sap_fast.cli.looks.evaluate_model", evaluate)
    return asked


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_looks_leave_the_training_alone(terminal: Terminal, tmp_path: Path) -> None:
    plain, looked = tmp_path / "plain", tmp_path / "looked"
    assert terminal.run(*terminal.finetuning(plain)) == 0
    few = [Request("Lie")]
    terminal.monkeypatch.setattr("sap_fast.cli.looks.requests_to_look_at", lambda _: few)
    more = ["--eval", terminal.files["task"], "--eval-every", "3"]
    assert terminal.run(*terminal.finetuning(looked, *more)) == 0, terminal.shown
    first, second = adapter(plain), adapter(looked)
    assert all(torch.equal(first[name], second[name]) for name in first)
    rows = [row for row in rows_of(looked / "metrics.jsonl") if "held_out/loss" in row]
    assert [row["step"] for row in rows] == [0, 3, 4]
    assert rows[0]["held_out/loss"] > rows[-1]["held_out/loss"] > 0
    assert all(row["held_out/refused_harmless"] == 0 for row in rows)
    assert all(row["held_out/refused"] == 0 and row["held_out/margin"] != 0 for row in rows)
    assert len(rows_of(looked / "metrics.jsonl")) == 4 + 3
    assert "held_out" not in (plain / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("keep", "looks", "best"),
    [
        ("loss", {0: (1, 0.5), 2: (3, 0.5), 4: (4, 0.5)}, 2),
        ("loss", {0: (5, 0.5), 2: (3, 0.1), 4: (2, 0.0)}, 4),
        ("loss", {0: (5, 0.5), 2: (3, 0.1), 4: (float("nan"), 0.0)}, 2),
        ("safety", {0: (5, 0.5), 2: (3, 0.5), 4: (2, 0.4)}, 2),
        ("safety", {0: (5, 0.5), 2: (3, 0.6), 4: (2, 0.5)}, 4),
        ("safety", {0: (5, 0.5), 2: (3, 0.3), 4: (2, 0.4)}, 4),
        ("safety", {0: (5, 0.5), 2: (3, 0.3), 4: (4, 0.3)}, 2),
    ],
)
def test_the_model_of_the_best_look_is_kept(
    terminal: Terminal, tmp_path: Path, keep: str, looks: dict[int, Any], best: int
) -> None:
    scripted(terminal, looks)
    saved = {}
    save = finetune_module.Looks._save

    def noted(self: Any) -> None:
        save(self)
        saved[self.best["step"]] = adapter(self._work / "best")

    terminal.monkeypatch.setattr(finetune_module.Looks, "_save", noted)
    output = tmp_path / "tuned"
    more = ["--optimizer", "adamw", "--eval", terminal.files["task"], "--eval-every", "2"]
    assert terminal.run(*terminal.finetuning(output, *more, "--keep-best", keep)) == 0
    kept = adapter(output)
    assert all(torch.equal(kept[name], saved[best][name]) for name in kept)
    assert json.loads((output / "run.json").read_text())["figures"]["kept_step"] == best
    assert not list(output.glob("best*"))


def test_an_interrupted_run_keeps_the_best_of_both_parts(
    terminal: Terminal, tmp_path: Path
) -> None:
    output = tmp_path / "tuned"
    more = ["--optimizer", "adamw", "--eval", terminal.files["task"], "--eval-every", "1"]
    command = terminal.finetuning(output, *more, "--keep-best", "loss", "--save-every", "2")
    scripted(terminal, {0: (5, 0), 1: (2, 0), 2: (3, 0)})  # and then it fails
    with pytest.raises(IndexError):
        terminal.run(*command)
    asked = scripted(terminal, {3: (4, 0), 4: (3, 0)})
    assert terminal.run(*command) == 0, terminal.shown
    assert len(asked) == 2
    rows = [row for row in rows_of(output / "metrics.jsonl") if "held_out/loss" in row]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert json.loads((output / "run.json").read_text())["figures"]["kept_step"] == 1


@pytest.mark.parametrize(
    ("keep", "patience", "looks", "stopped", "best"),
    [
        ([], 2, {0: (1, 0), 1: (5, 0), 2: (4, 0), 3: (4, 0), 4: (6, 0)}, 4, 2),
        ([], 1, {0: (1, 0), 1: (5, 0), 2: (4, 0), 3: (4, 0)}, 3, 2),
        ([], 1, {0: (1, 0), 1: (5, 0), 2: (4, 0), 3: (3, 0), 4: (2, 0), 5: (1, 0)}, None, 5),
        # The last look of all stops nothing.
        ([], 1, {0: (1, 0), 1: (5, 0), 2: (4, 0), 3: (3, 0), 4: (2, 0), 5: (2, 0)}, None, 4),
        (["--keep-best", "loss"], 1, {0: (1, 0), 1: (5, 0), 2: (float("nan"), 0)}, 2, 1),
        (["--keep-best", "safety"], 1, {0: (1, 0.5), 1: (5, 0.5), 2: (4, 0.4)}, 2, 1),
    ],
)
def test_training_stops_early_where_looks_get_no_better(
    terminal: Terminal,
    tmp_path: Path,
    keep: list[str],
    patience: int,
    looks: dict[int, Any],
    stopped: int | None,
    best: int,
) -> None:
    asked = scripted(terminal, looks)
    output = tmp_path / "tuned"
    more = ["--optimizer", "adamw", "--eval", terminal.files["task"], "--eval-every", "1", *keep]
    more += ["--early-stop", str(patience), "--max-steps", "5"]
    assert terminal.run(*terminal.finetuning(output, *more)) == 0, terminal.shown
    assert len(asked) == len(looks)
    figures = json.loads((output / "run.json").read_text())["figures"]
    assert figures.get("stopped_step") == stopped
    assert ("kept_step" in figures) == bool(keep) and figures.get("kept_step", best) == best
    shown = " ".join(terminal.shown.split())
    followed = "safe model" if "safety" in keep else "held-out loss"
    why = f"of 5: {patience} look(s) without a better {followed} than at step {best}"
    assert (why in shown) == (why in str(figures.get("why_stopped"))) == (stopped is not None)


def test_an_early_stop_is_found_again_by_a_run_that_was_interrupted_after_it(
    terminal: Terminal, tmp_path: Path
) -> None:
    output = tmp_path / "tuned"
    more = ["--optimizer", "adamw", "--eval", terminal.files["task"], "--eval-every", "1"]
    more += ["--early-stop", "2", "--save-every", "1", "--max-steps", "9"]
    command = terminal.finetuning(output, *more)
    scripted(terminal, {0: (5, 0), 1: (2, 0), 2: (3, 0), 3: (3, 0)})

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with terminal.monkeypatch.context() as patched:
        patched.setattr(finetune_module._Recorder, "figures", interrupted)
        assert terminal.run(*command) == 130
    asked = scripted(terminal, {3: (3, 0)})
    assert terminal.run(*command) == 0, terminal.shown
    assert len(asked) == 1 and "Going on from checkpoint-2" in terminal.shown
    assert json.loads((output / "run.json").read_text())["figures"]["stopped_step"] == 3
    rows = [row for row in rows_of(output / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3]


def test_requests_that_are_looked_at_are_in_no_pair(terminal: Terminal, tmp_path: Path) -> None:
    looked_at = requests_to_look_at()
    assert len(looked_at) == 24
    half = [request.prompt for request in builtin_requests("training", "harmful")]
    assert {request.prompt for request in looked_at} <= set(half)
    asked: list[str] = []

    def none(model: Any, tokenizer: Any, prompts: list[str], **_: Any) -> list[None]:
        asked.extend(prompts)
        return [None] * len(prompts)

    terminal.monkeypatch.setattr("sap_fast.cli.pairs.own_refusals", none)
    looks = scripted(terminal, {0: (5, 0), 1: (4, 0)})
    more = ["--optimizer", "blend", "--safety", "builtin", "--max-steps", "1"]
    more += ["--eval", terminal.files["task"]]
    assert terminal.run(*terminal.finetuning(tmp_path / "tuned", *more)) == 0, terminal.shown
    assert looks[0]["harmful"] == looked_at
    assert sorted([*asked, *(request.prompt for request in looked_at)]) == sorted(half)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--eval-every", "2"], "--eval-every needs --eval"),
        (["--keep-best", "loss"], "--keep-best needs --eval"),
        (["--early-stop", "2"], "--early-stop needs --eval"),
        (["--early-stop", "2", "--eval", "none.jsonl"], "--early-stop 2: needs --eval-every"),
        (["--keep-best", "both"], "--keep-best both: expected loss or safety"),
        (["--eval", "none.jsonl"], "none.jsonl: got no such file"),
        (["--report-to", "paper"], "--report-to paper: expected none, or of tensorboard, wandb"),
        (["--report-to", "wandb"], "--report-to wandb: its package is not installed"),
    ],
)
def test_looks_that_cannot_be_are_one_line(
    terminal: Terminal, tmp_path: Path, more: list[str], message: str
) -> None:
    terminal.monkeypatch.setattr("sap_fast.cli.settings.find_spec", lambda name: None)
    assert message in terminal.refusal(*terminal.finetuning(tmp_path / "tuned", *more))


def test_figures_go_to_tensorboard_beside_the_result(terminal: Terminal, tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    (packages / "tensorboardX").mkdir(parents=True)
    (packages / "tensorboardX" / "__init__.py").write_text(
        "import json, os\n"
        "class SummaryWriter:\n"
        "    def __init__(self, log_dir):\n"
        "        os.makedirs(log_dir, exist_ok=True)\n"
        "        self.file = open(os.path.join(log_dir, 'written.jsonl'), 'w')\n"
        "    def add_text(self, *_): pass\n"
        "    def add_scalar(self, name, value, step):\n"
        "        self.file.write(json.dumps([name, value, step]) + '\\n')\n"
        "    def flush(self): self.file.flush()\n"
        "    def close(self): self.file.close()\n"
    )
    terminal.monkeypatch.setattr(sys, "path", [str(packages), *sys.path])
    integrations = "transformers.integrations.integration_utils"
    terminal.monkeypatch.setattr(f"{integrations}.is_tensorboard_available", lambda: True)
    scripted(terminal, {0: (5, 0), 2: (4, 0.5)})
    output = tmp_path / "tuned"
    more = ["--report-to", "tensorboard", "--max-steps", "2", "--eval", terminal.files["task"]]
    assert terminal.run(*terminal.finetuning(output, *more)) == 0, terminal.shown
    written = rows_of(output / "tensorboard" / "written.jsonl")
    assert {step for name, _, step in written if name == "train/sap/lean"} == {1, 2}
    assert ["train/held_out/refused", 0.5, 2] in written
    assert not (output / "checkpoints").exists()
