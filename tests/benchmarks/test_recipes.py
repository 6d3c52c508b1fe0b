"""What leaving work out costs, measured on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import recipes
from benchmarks.recipes import COMPARED
from tests.benchmarks.helpers import SURROUNDINGS, is_picture, read


def test_similarity_is_the_mean_over_layers() -> None:
    vectors = {0: torch.tensor([1.0, 0.0]), 1: torch.tensor([0.0, 2.0])}
    turned = {0: torch.tensor([3.0, 0.0]), 1: torch.tensor([1.0, 0.0])}
    assert recipes.similarity(vectors, turned) == pytest.approx(0.5)


def test_the_price_is_measured_against_the_full_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One that leaves nothing out, and so has the V of the full step.
    monkeypatch.setitem(COMPARED, "nothing", recipes.Recipe())
    recipes.main(["--quick", "--steps", "9", "--output", str(tmp_path)])
    rows = {row["settings"]: row for row in read(tmp_path / "recipes.csv")}
    assert list(rows) == list(COMPARED)
    assert {row["steps"] for row in rows.values()} == {"4"}
    assert float(rows.pop("nothing")["cosine_low"]) > 0.999
    assert all(float(row["cosine"]) < 0.999 for row in rows.values())
    assert float(rows["rows=1/4"]["cosine"]) < float(rows["rows=1/2"]["cosine"])
    assert all(set(row) >= SURROUNDINGS for row in rows.values())
    assert is_picture(tmp_path / "recipes.png")


def test_too_few_steps_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        recipes.main(["--steps", "6"])
    assert "--steps 6; expected at least 7" in capsys.readouterr().err
