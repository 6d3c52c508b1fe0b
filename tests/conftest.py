"""What every test starts from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from accelerate.state import AcceleratorState, GradientState

from sap_fast.ops import why_not


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Forget precision and accumulation of the test before: accelerate keeps them per process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield


@pytest.fixture(params=["native", "reference"])
def cpu_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each backend of the CPU in turn, in the place of "auto"."""
    reason = why_not(request.param, "cpu")
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setenv("SAP_FAST_BACKEND", request.param)
    return request.param
