"""Data of the shape of the real one, in the place of downloads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import assets
from benchmarks.study import runs
from benchmarks.study.methods import TRAINING


@pytest.fixture(autouse=True)
def no_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data of the shape of the real one."""
    monkeypatch.setattr(
        assets, "harmful_requests", lambda: [f"Wreck{k} thing{k} now{k}" for k in range(520)]
    )
    monkeypatch.setattr(assets, "harmless_requests", lambda: [f"Lock {k}" for k in range(150)])
    monkeypatch.setattr(
        assets,
        "alpaca_rows",
        lambda: [{"instruction": f"Do {k}", "input": "", "output": "Done."} for k in range(999)],
    )
    monkeypatch.setattr(
        assets,
        "review_sentences",
        lambda: [(f"Film {k}", ("positive", "negative")[k % 2]) for k in range(1200)],
    )
    monkeypatch.setattr(
        assets,
        "gsm8k_rows",
        lambda: [{"prompt": f"Problem {k}", "completion": f"#### {k}"} for k in range(100)],
    )


@pytest.fixture
def tiny_study(chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs of two steps on a tiny model, in a folder of their own; the threads come back."""
    monkeypatch.setattr(runs, "WORK", tmp_path)
    monkeypatch.setattr(runs, "aligned_smollm2", lambda seed: chat_model)
    monkeypatch.setitem(TRAINING, "steps", 2)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
