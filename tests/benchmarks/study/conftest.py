"""Data of the shape of the real one, in the place of downloads."""

from __future__ import annotations

import pytest

from benchmarks import assets


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
