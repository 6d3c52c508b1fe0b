"""What every measure shares: evaluation mode and batches of similar length."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from sap_fast.data import EncodedRow, TaskCollator
from sap_fast.evaluation.progress import Progress
from sap_fast.losses import response_log_probs
from sap_fast.losses.aside import evaluation_mode


def similar_length_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices of the sequences in batches, longest first: little padding, and the peak at once.

    Raises:
        ValueError: `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}; expected at least 1")
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def device_of(model: nn.Module) -> torch.device:
    """The device that the inputs of `model` belong on."""
    return next(model.parameters()).device


def score_rows(
    model: nn.Module,
    rows: Sequence[EncodedRow],
    *,
    pad_token_id: int,
    batch_size: int,
    progress: Progress,
    description: str,
) -> Tensor:
    """The summed log-probability of each row's labelled tokens, (rows,) fp64 on the CPU.

    Args:
        model: A causal language model, or a module that says by `response_log_probs(batch)` itself
            what it finds likely, as one whose decoding is not that of its weights alone.
        rows: What to score.
        pad_token_id: For the batches.
        batch_size: Rows per batch.
        progress: Shows the number of rows scored.
        description: Of what is scored, for the progress.
    """
    collate = TaskCollator(pad_token_id)
    device = device_of(model)
    score = getattr(model, "response_log_probs", partial(response_log_probs, model))
    scores = torch.empty(len(rows), dtype=torch.float64)
    batches = similar_length_batches([len(row["input_ids"]) for row in rows], batch_size)
    # no_grad rather than inference_mode: tensors that a model caches in its forward (rotary
    # frequencies, for one) would become inference tensors, on which later training fails.
    with evaluation_mode(model), torch.no_grad(), progress(description, len(rows)) as bar:
        for indices in batches:
            batch = collate([rows[index] for index in indices])
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            log_probs = score(batch)
            scores[indices] = log_probs.to("cpu", torch.float64)
            bar.advance(len(indices))
    return scores
