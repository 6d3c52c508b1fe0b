"""torchtitan's trainer with the passes around its step: its classes, on two CPU ranks."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torchtitan", reason="it is of `make test-stacks`")

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def shown(folder: Path, steps: int) -> str:
    """What the example prints, in a folder from whose checkpoints it goes on."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    example = ["examples/torchtitan_trainer.py", "--tiny", "--steps", str(steps)]
    done = subprocess.run(
        [
            *(sys.executable, *launcher, str(HERE / "torchtitan_on_cpus.py")),
            *(str(ROOT / example[0]), *example[1:], "--folder", str(folder)),
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=folder.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def losses(output: str) -> dict[int, tuple[str, str]]:
    """By step: the safety loss that the example prints, and the loss that torchtitan logs."""
    plain = re.sub(r"\x1b\[\d+m", "", output)
    safety = dict(re.findall(r"step (\d+): safety loss (\d+\.\d+)", plain))
    task = dict(re.findall(r"step: +(\d+) +loss: +(\d+\.\d+)", plain))
    return {int(step): (safety[step], task.get(step, "")) for step in safety}


def test_its_steps_run_and_resume(tmp_path: Path) -> None:
    straight = shown(tmp_path / "straight", 3)
    assert "Losses are computed from its own logits" in straight
    found = losses(straight)
    assert list(found) == [1, 2, 3]
    assert float(found[1][1]) == pytest.approx(8.1, abs=0.6)  # ln 2048, and the first weights
    assert float(found[1][0]) == pytest.approx(0.69, abs=0.4)

    # The same number of steps in all, as the learning rate follows from it.
    shutil.rmtree(tmp_path / "straight" / "step-3")
    resumed = losses(shown(tmp_path / "straight", 3))
    assert list(resumed) == [3] and resumed[3] == found[3]
