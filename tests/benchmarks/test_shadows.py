"""Shadows of W beside the swap: the same h, and what errors leave behind."""

from __future__ import annotations

import pytest
import torch

from benchmarks import shadows
from benchmarks.shadows import Shadows, multiplied_in_bf16
from benchmarks.workloads import Row, Shape, random_llama
from sap_fast.step import trained
from sap_fast.step.direction import Direction
from sap_fast.step.guards import Perturbation

SMALL = Shape("small", 64, 2, 4, 2, 128, 256, tied=False)


@pytest.fixture(scope="module")
def rows() -> dict[tuple[str, str, str], Row]:
    measured = shadows.measure(SMALL, SMALL, "cpu", rounds=1, stride=101, rows=2, length=16)
    return {(row["kind"], row["direction"], row["way"]): row for row in measured}


def test_both_ways_find_the_same_h_and_one_never_writes_to_w(
    rows: dict[tuple[str, str, str], Row],
) -> None:
    assert len(rows) == 3 * 2 * 2
    for direction in ("used up", "kept"):
        assert rows["memory", direction, "shadows"]["cosine_of_h"] > 0.999
        assert rows["memory", direction, "shadows"]["peak_mb"] > 0
        swap, shadow = (rows["faults", direction, name] for name in ("swap", "shadows"))
        assert swap["errors"] == pytest.approx(shadow["errors"], rel=0.2) and swap["errors"] > 3
        assert swap["overwritten"] > 0 and swap["lost"] == 0 and swap["lost_if_lasting"] > 0
        assert shadow["overwritten"] == shadow["lost"] == shadow["lost_if_lasting"] == 0
        assert rows["seconds", direction, "swap"]["ratio"] == 1.0


def test_the_package_has_its_own_way_again_whatever_happens() -> None:
    model = random_llama(SMALL)
    buffers = Direction.buffers
    with pytest.raises(ValueError, match="injected"), shadows.way("shadows", model):
        assert trained.Perturbation is Shadows
        raise ValueError("injected")
    assert trained.Perturbation is Perturbation and Direction.buffers is buffers


def test_tied_embeddings_and_norms_are_not_multiplied_in_bf16() -> None:
    untied, tied = random_llama(SMALL), random_llama(Shape("", 64, 2, 4, 2, 128, 256, tied=True))
    assert untied.lm_head.weight in multiplied_in_bf16(untied)
    low = multiplied_in_bf16(tied)
    assert tied.lm_head.weight not in low and tied.model.norm.weight not in low
    assert tied.model.layers[0].mlp.up_proj.weight in low
    assert all(p.dtype == torch.float32 for p in tied.parameters())
