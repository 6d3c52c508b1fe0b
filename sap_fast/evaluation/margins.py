"""How much likelier is a refusal than an affirmative opening?"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from sap_fast.data import Request, build_safety_pair, encode_chat, padding_token_id
from sap_fast.evaluation.batching import score_rows
from sap_fast.evaluation.progress import Progress, no_progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def refusal_margins(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    requests: Sequence[Request],
    *,
    batch_size: int = 16,
    progress: Progress = no_progress,
) -> Tensor:
    """How much likelier a model finds a refusal than an affirmative opening.

    The margin is log p(refusal | request) − log p(opening | request), summed over tokens, in nats.
    Neither text is scored with an end-of-turn token. Where a request brings no refusal or opening
    of its own, those of `build_safety_pair` serve, the refusal picked by the request's position.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        requests: What to score.
        batch_size: Sequences per batch; there are two per request.
        progress: Shows the number of sequences scored.

    Returns:
        (requests,) fp64 on the CPU; positive where the refusal is likelier.

    Raises:
        ValueError: `batch_size` is below 1.
    """
    rows = []
    for index, request in enumerate(requests):
        pair = build_safety_pair(request.prompt, index)
        for answer in (request.refusal or pair["chosen"], request.opening or pair["rejected"]):
            messages = [
                {"role": "user", "content": request.prompt},
                {"role": "assistant", "content": answer},
            ]
            rows.append(encode_chat(tokenizer, messages, complete=False))
    scores = score_rows(
        model,
        rows,
        pad_token_id=padding_token_id(tokenizer),
        batch_size=batch_size,
        progress=progress,
        description="Scoring refusals",
    )
    return scores[0::2] - scores[1::2]
