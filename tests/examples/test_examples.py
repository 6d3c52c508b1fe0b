"""Every example runs, and says what it is."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(path for path in EXAMPLES.glob("*.py") if not path.stem.startswith("common"))
ON_RANKS = [script for script in SCRIPTS if "torchrun" in script.read_text()]
#: torchtitan has to be told that a CPU is a device: tests/integrations/test_torchtitan.py does.
ELSEWHERE = [EXAMPLES / "torchtitan_trainer.py"]
#: Examples for stacks of `make test-stacks`, and what each imports.
OF_STACKS = {
    "deepspeed_loop": "deepspeed",
    "lightning_loop": "pytorch_lightning",
    "torchtitan_trainer": "torchtitan",
}


def skip_without_its_stack(script: Path) -> None:
    if script.stem in OF_STACKS:
        pytest.importorskip(OF_STACKS[script.stem], reason="its stack is of `make test-stacks`")


@pytest.fixture
def as_from_examples(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Let a script that is run in this process find what is beside it, and write elsewhere."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("common", None)


def assert_says_its_losses(shown: str) -> None:
    """Every step says its loss. Random tokens of 256: ln 256 = 5.5 each."""
    losses = [float(found) for found in re.findall(r"(?m)^.*?\bloss\W+(\d+\.\d+)", shown)]
    assert len(losses) >= 2 and losses[:2] == pytest.approx([5.5, 5.5], abs=0.3), shown


@pytest.mark.parametrize(
    ("script", "more"),
    [
        *((script, []) for script in SCRIPTS if script not in ON_RANKS),
        *(
            (EXAMPLES / f"{name}.py", ["--blend"])
            for name in ("plain_loop", "trainer_lora", "trl_sft")
        ),
        *(
            pytest.param(EXAMPLES / "any_optimizer.py", ["--optimizer", name], marks=marks)
            for name, marks in {
                "bitsandbytes": (),
                "torchao": (),
                "schedulefree": (),
                "paged": pytest.mark.slow,  # on a CPU the first of these
            }.items()
        ),
    ],
    ids=lambda value: value.stem if isinstance(value, Path) else " ".join(value),
)
def test_every_example_runs(
    script: Path,
    more: list[str],
    as_from_examples: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    skip_without_its_stack(script)
    monkeypatch.setattr(sys, "argv", [str(script), "--tiny", "--steps", "2", *more])
    # torchao compiles its update, which takes a minute.
    with torch.compiler.set_stance("force_eager"):
        runpy.run_path(str(script), run_name="__main__")
    assert_says_its_losses(capsys.readouterr().out)


@pytest.mark.parametrize(
    "script",
    [script for script in ON_RANKS if script not in ELSEWHERE],
    ids=lambda path: path.stem,
)
def test_every_example_on_ranks_runs(script: Path, tmp_path: Path) -> None:
    skip_without_its_stack(script)
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run(
        [sys.executable, *launcher, str(script), "--tiny", "--steps", "2"],
        env=os.environ | {"PYTHONPATH": str(EXAMPLES.parent)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert_says_its_losses(done.stdout)


def test_lightning_starts_the_other_process_itself(tmp_path: Path) -> None:
    skip_without_its_stack(EXAMPLES / "lightning_loop.py")
    script = str(EXAMPLES / "lightning_loop.py")
    command = [sys.executable, script, "--tiny", "--steps", "2", "--devices", "2"]
    folder = ["--folder", str(tmp_path / "checkpoints")]
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(
        [*command, *folder], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert_says_its_losses(done.stdout)
    checkpoint = str(tmp_path / "checkpoints" / "epoch=0-step=1.ckpt")
    again = subprocess.run(
        [*command, "--folder", str(tmp_path / "others"), "--resume", checkpoint],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert again.returncode == 0, again.stderr[-3000:]
    assert "step 1:" not in again.stdout and "step 2:" in again.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_example_explains_itself(
    script: Path,
    as_from_examples: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    skip_without_its_stack(script)
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    # What torchrun sets is not there.
    monkeypatch.setattr(dist, "init_process_group", lambda: pytest.fail("before the arguments"))
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_path(str(script), run_name="__main__")
    shown = capsys.readouterr().out
    assert f"examples/{script.name} --tiny" in shown and "--model" in shown
    assert f"`{script.name}`" in (EXAMPLES / "README.md").read_text()
    assert len(script.read_text().splitlines()) < 80


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_no_example_knows_the_order_of_the_passes(script: Path) -> None:
    text = script.read_text()
    assert "safety_pass" not in text and "probe_pass" not in text and "calibrate" not in text
