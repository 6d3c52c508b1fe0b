"""FusedSAP: BlendedAdamW with a probe."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sap_fast import BlendedAdamW, FusedSAP, ProbeSet
from tests.tiny import plain_adamw, problem, safety, sap, task, weights


def test_it_is_a_blended_adamw_that_blends_nothing() -> None:
    case = problem()
    optimizer = sap(case)
    assert isinstance(optimizer, BlendedAdamW)
    assert optimizer.probes is optimizer.passes.probes
    assert optimizer.passes.safety_weight == 0 and optimizer.passes.level.setting is None


def test_the_probe_changes_the_update() -> None:
    ours, theirs = problem(), problem()
    sap(ours).step(lambda: task(ours), lambda: safety(ours))
    task(theirs)
    plain_adamw(theirs.trained, lr=1e-2).step()
    assert any(not torch.equal(a, b) for a, b in zip(weights(ours), weights(theirs), strict=True))


@pytest.mark.parametrize("probes", [None, "early", [1, 2]])
def test_without_a_probe_set_it_says_what_to_use(probes: Any) -> None:
    case = problem()
    with pytest.raises(TypeError, match=r"is no ProbeSet.*use BlendedAdamW"):
        FusedSAP(case.trained, probes)


def test_parameters_of_another_model_are_refused() -> None:
    case, other = problem(), problem()
    with pytest.raises(ValueError, match="share no parameter"):
        FusedSAP(other.trained, ProbeSet(case.model))
