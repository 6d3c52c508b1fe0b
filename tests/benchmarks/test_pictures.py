"""Pictures are drawn from CSVs, those that are committed too."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks import pictures
from benchmarks.provenance import RESULTS
from tests.benchmarks.helpers import is_picture

COMMITTED = sorted(path for name in pictures.PICTURES for path in RESULTS.glob(name))


@pytest.mark.parametrize("csv", COMMITTED, ids=lambda path: path.name)
def test_a_committed_csv_can_be_drawn(csv: Path, tmp_path: Path) -> None:
    # Labels of rows that are older included.
    picture = pictures.draw(Path(shutil.copy(csv, tmp_path)))
    assert picture == tmp_path / f"{csv.stem}.png" and is_picture(picture)
    # And what is committed was.
    assert is_picture(csv.with_suffix(".png"))


def test_there_is_a_csv_for_every_picture() -> None:
    assert {path.name for path in COMMITTED} >= {
        "step_time.csv",
        "step_curves.csv",
        "ops.csv",
        "recipes.csv",
        "fidelity.csv",
    }
