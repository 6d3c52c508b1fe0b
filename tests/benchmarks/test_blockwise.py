"""What is said of directions in int8: the figures on the page are those of the CSV."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.blockwise import SHAPE, compare, heavy_tailed
from benchmarks.provenance import RESULTS, ROOT, read_rows


def test_figures_are_of_all_tensors_together_and_of_the_worst() -> None:
    normal, small = heavy_tailed(math.inf), torch.ones(10)
    row = compare("both", [normal, small])
    assert row["elements"] == normal.numel() + 10 and row["tensors"] == 2
    assert row["quantized"] == pytest.approx(1.0, abs=1e-4)
    assert row["worst_cosine"] <= row["cosine"] < 1 and row["met"] == "yes"
    # An angle of so much is what such an error makes of it.
    assert math.sqrt(2 * (1 - row["cosine"])) == pytest.approx(row["relative_error"], rel=0.01)
    assert row["bytes_per_element"] == pytest.approx(1 + 4 / 256, abs=1e-4)
    assert compare("exact", [small])["worst_cosine"] == 1.0


def test_tails_are_as_heavy_as_they_are_called() -> None:
    normal, cauchy = heavy_tailed(math.inf).abs(), heavy_tailed(1).abs()
    assert normal.shape == SHAPE and normal.max() < 7
    assert cauchy.median().item() == pytest.approx(1.0, rel=0.02) and cauchy.max() > 1e4


def test_the_page_has_the_figures_of_the_csv() -> None:
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    rows = read_rows(RESULTS / "blockwise.csv")
    assert rows
    for row in rows:
        assert row["met"] == "yes" and float(row["worst_cosine"]) >= 0.999
        figures = [f"{float(row[name]):.5f}" for name in ("cosine", "worst_cosine")]
        cells = [row["what"], *figures, f"{float(row['bytes_per_element']):.3f}"]
        assert f"| {' | '.join(cells)} |" in page
