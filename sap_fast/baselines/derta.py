"""DeRTa: refusals from any place in a harmful answer, as a safety loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sap_fast.losses.batches import (
    IGNORE_INDEX,
    Batch,
    as_rows,
    check_batch,
    concatenate,
    find_scored,
)
from sap_fast.losses.scoring import response_log_probs


def derta_loss(model: nn.Module, chosen: Batch, rejected: Batch, *, pack: bool = True) -> Tensor:
    """Returns nll(safe response | start of the harmful one) + nll(turn to refusing at each token).

    Yuan et al. 2024 (arXiv:2407.09121). The first term is the mean over rows of the loss of the
    safe response after a start of the harmful one, of 0 to all but its last token. The second is
    that of the safe response's first token at every place in the harmful one. Both are means per
    token. The lengths are drawn from PyTorch's random numbers of the CPU.

    Args:
        model: A causal language model, possibly wrapped.
        chosen: The safe responses, a batch of B rows.
        rejected: The harmful responses to the same prompts, row for row.
        pack: Compute shared prefixes once, and no padding.

    Returns:
        A scalar, fp32 (fp64 for an fp64 model).

    Raises:
        ValueError: A row has no scored token, or the batches do not pair.
    """
    check_batch(chosen, "chosen")
    check_batch(rejected, "rejected")
    safe, harmful = _responses(as_rows(chosen)), _responses(as_rows(rejected))
    if len(safe) != len(harmful):
        raise ValueError(f"chosen has {len(safe)} rows and rejected {len(harmful)}; expected pairs")
    if not all(len(response) for _, response in safe + harmful):
        raise ValueError("a row of chosen or rejected has no scored token; expected some in each")
    device = chosen["input_ids"].device
    recovering, turning = [], []
    for (_, answer), (prompt, response) in zip(safe, harmful, strict=True):
        started = int(torch.randint(len(response), ()))
        given = torch.cat((prompt, response[:started]))
        recovering.append((torch.cat((given, answer)), _labels(given, answer)))
        turn = answer[:1].expand(len(response))
        turning.append((torch.cat((prompt, response)), _labels(prompt, turn)))
    batch = concatenate(_padded(recovering, device), _padded(turning, device))
    return -2 * response_log_probs(model, batch, reduction="mean", pack=pack).mean()


def _responses(batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """Returns of each row, on the host, what comes before the first scored token, and the rest."""
    scored, responses = find_scored(batch), []
    labels = batch["labels"].cpu()
    for row, attended in enumerate(scored.attended):
        tokens = scored.tokens[row][attended]
        first = (labels[row][attended] != IGNORE_INDEX).long()
        start = int(first.argmax()) if first.any() else len(tokens)
        responses.append((tokens[:start], tokens[start:]))
    return responses


def _labels(given: Tensor, targets: Tensor) -> Tensor:
    return torch.cat((torch.full_like(given, IGNORE_INDEX), targets))


def _padded(rows: list[tuple[Tensor, Tensor]], device: torch.device) -> dict[str, Tensor]:
    def pad(tensors: list[Tensor], value: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(tensors, True, value).to(device)

    return {
        "input_ids": pad([tokens for tokens, _ in rows], 0),
        "labels": pad([labels for _, labels in rows], IGNORE_INDEX),
        "attention_mask": pad([torch.ones_like(tokens) for tokens, _ in rows], 0),
    }
