"""What tables have to satisfy, on tables that do and that don't."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.claims import Claim, before_after_claims, judged, step_claims


@pytest.mark.parametrize(
    ("relation", "met"), [("≤", [True, True, False]), ("≥", [False, True, True])]
)
def test_a_claim_is_met_at_its_target(relation: str, met: list[bool]) -> None:
    assert [Claim("", "", value, relation, 1.0).met for value in (0.9, 1.0, 1.1)] == met


def cell(name: str, **figures: Any) -> dict[str, Any]:
    return {"setup": "lora", "batch": "8x128", "dtype": "fp32", "configuration": name} | figures


def test_claims_on_time() -> None:
    table = [
        cell("sap", times_hf=2.7, sap_over_this=1.0),
        cell("sap, direction_every=5, rows=1/2", times_hf=1.6, sap_over_this=1.0),
        cell("blend", times_hf=9.0, sap_over_this=1.0),  # nothing was promised
        cell("published", times_hf=5.0, sap_over_this=0.25),
        cell("passes alone", times_hf=2.7, sap_over_this=1.04),
    ]
    assert [(c.claim, c.value, c.met) for c in step_claims({"time": table})] == [
        ("1 sap ÷ HF AdamW", 2.7, False),
        ("1 sap, direction_every=5, rows=1/2 ÷ HF AdamW", 1.6, True),
        ("2 published ÷ sap", 4.0, True),
        ("3 sap ÷ its passes", 1.04, True),
    ]


def test_claims_on_fewer_rows_are_against_our_loss() -> None:
    name = "sap, direction_every=10, rows=1/4"
    figures = {"times_hf": 1.1, "times_floor": 1.5}
    table = [
        {"setup": setup, "batch": batch, "dtype": "fp32", "configuration": name} | figures
        for setup in ("lora", "full")
        for batch in ("8x128", "4x96")
    ]
    found = step_claims({"rows": table})
    assert [(claim.claim, claim.where, claim.target, claim.met) for claim in found] == [
        (f"7 {name} ÷ AdamW with our loss", "lora 8x128 fp32", 1.7, True),
        (f"7 {name} ÷ AdamW with our loss", "full 8x128 fp32", 1.45, False),
    ]


def test_claims_on_memory() -> None:
    table = [
        cell(name, checkpointing=mode, resident_mb=resident, tensors_mb=2 * resident)
        for mode, sizes in (("none", (100, 70, 72)), ("layers", (50, 49, 52)))
        for name, resident in zip(("hf_adamw", "floor", "sap"), sizes, strict=True)
    ]
    found = {(c.claim, c.where): (c.value, c.met) for c in step_claims({"memory": table})}
    for kind in ("resident", "tensors"):
        plain, saved = "lora 8x128 fp32 none", "lora 8x128 fp32 layers"
        assert found[f"4 {kind}: sap ÷ our AdamW", plain] == (1.029, True)
        assert found[f"4 {kind}: sap ÷ our AdamW", saved] == (1.061, False)
        assert found[f"4 {kind}: sap ÷ HF", plain] == (0.72, True)
        assert found[f"4 {kind}: sap ÷ HF", saved] == (1.04, False)
        assert found[f"4 {kind}: checkpointed ÷ not", saved] == (0.722, False)
    assert len(found) == 10


def test_claims_on_allocations_and_curves() -> None:
    allocations = [
        {"dtype": "bf16", "configuration": name, "kept_over_parameters": 2.0}
        | {"peak_over_parameters": peak}
        for name, peak in (("floor", 1.2), ("sap", 1.3))
    ]
    curves = [
        {"axis": "depth", "dtype": "fp32", "configuration": name}
        | {"slope_seconds": seconds, "slope_tensors_mb": 1.0}
        for name, seconds in (("floor", 0.9), ("sap", 0.94))
    ]
    found = step_claims({"allocations": allocations, "curves": curves})
    assert [(claim.claim, claim.where, claim.value, claim.met) for claim in found] == [
        ("5 kept: sap − AdamW, in parameters", "full bf16", 0.0, True),
        ("5 peak: sap − AdamW, in parameters", "full bf16", 0.1, False),
        ("6 slope of seconds: sap − AdamW", "depth fp32", 0.04, True),
        ("6 slope of tensors_mb: sap − AdamW", "depth fp32", 0.0, True),
    ]


def test_a_change_may_cost_three_percent() -> None:
    row = {"setup": "full", "batch": "4x96", "dtype": "fp32", "method": "sap"}
    found = before_after_claims([row | {"time_ratio": 1.04, "tensors_ratio": 1.03}])
    assert [(claim.claim, claim.met) for claim in found] == [
        ("time: after ÷ before", False),
        ("tensors: after ÷ before", True),
    ]


@pytest.mark.parametrize(
    ("claim", "contender", "ratio", "met"),
    [
        ("1 bandwidth", "reflect_", 0.9, "yes"),
        ("1 bandwidth", "reflect_", 0.8, "no"),
        ("2 AdamW", "adamw_blend_", 0.9, "yes"),
        ("2 AdamW", "adamw_blend_", 1.1, "no"),
        ("2 AdamW", "torch._fused_adamw_", 1.0, ""),
    ],
)
def test_operations_are_judged_by_their_ratio(
    claim: str, contender: str, ratio: float, met: str
) -> None:
    assert judged(claim, contender, ratio)["met"] == met
