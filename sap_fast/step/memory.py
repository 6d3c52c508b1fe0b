"""Passes that run out of memory run again, with every decoder layer checkpointed.

A pass that fails leaves no trace, and checkpointing changes no bit of what it computes. So the
second run is the first one, in less memory and some more time.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from sap_fast.step.trained import Trained

_Result = TypeVar("_Result")


def run_again_out_of_memory(
    run: Callable[[], _Result],
    trained: Trained,
    *,
    warn: Callable[[str], None],
    put_back: Callable[[], None] | None = None,
) -> _Result:
    """Return what `run` returns, the second time if it ran out of memory the first time.

    Args:
        run: passes, which leave no trace if they fail.
        trained: their parameters; its layers are checkpointed from then on.
        warn: is told of the second run before it begins.
        put_back: called before it, for what `run` does not put back.

    Raises:
        torch.OutOfMemoryError: of the second run; or of the first one, with a note why there is no
            second.
    """
    try:
        return run()
    except torch.OutOfMemoryError as error:
        reason = _why_not_alone(trained) or trained.checkpoint_layers()
        if reason is not None:
            error.add_note(
                f"sap_fast: what failed is not run again with its layers checkpointed: {reason}"
            )
            raise
        figures = ". ".join(str(error).split(". ")[:2])
        warn(
            f"sap_fast: a pass ran out of memory ({figures}); it is run again, and every decoder "
            "layer is checkpointed from now on, which changes no result and takes more time"
        )
    # Only here is the error gone, and with it the activations in the frames of its traceback.
    gc.collect()
    for kind in {parameter.device.type for parameter in trained.parameters} - {"cpu", "meta"}:
        torch.get_device_module(kind).empty_cache()
    if put_back is not None:
        put_back()
    return run()


def _why_not_alone(trained: Trained) -> str | None:
    """Return why this process cannot run a pass again by itself; None if it can."""
    if trained.ranks or (dist.is_initialized() and dist.get_world_size() > 1):
        return (
            "the model is spread over ranks, and the others wait for this one in the pass that "
            "failed"
        )
    return None
