"""Task loss and safety losses over response tokens; the full B×S×V logits never exist.

What they share:

- *Model.* A causal language model, possibly wrapped (PEFT, DDP, `torch.compile`).
- *Batch.* A mapping with `input_ids`, `labels` and, where rows are padded, `attention_mask`, each
  (B, S), and further tensors for the model's forward. `labels` equal `input_ids` where a token is
  scored and are `IGNORE_INDEX` elsewhere. Position s predicts token s+1. A token is scored where
  its label says so and neither it nor the token before it is padding, so the padding side does not
  change a loss. No mask is made up for a model: without one, `position_ids` that start again tell
  sequences that share a row, as transformers' `DataCollatorWithFlattening` packs them.
- *Virtual tokens.* Those that PEFT puts before a row (prompt tuning and its relatives) are not
  scored; they predict the first token, where that is.
- *Pairs.* `chosen` holds safe responses, and `rejected` the harmful responses to the same prompts,
  row for row. Both batches run as one forward.
- *Reduction.* The `"mean"` over the tokens of a response, or their `"sum"`, is what stands for its
  log-probability in the losses of pairs.
- *Packing.* With `pack=True`, what sequences share at their start is computed once, and padding not
  at all, where that pays, the model allows and nothing reads a row
  (`sap_fast.losses.packable`). The result is equal up to rounding without dropout. With dropout, a
  shared prefix draws one mask for all that share it.
- *Logits.* They are computed at the scored positions alone and a chunk at a time, by the model's
  own head (`sap_fast.losses.head`). Where a model's head is not of a known kind, a loss is computed
  from the model's full logits, and a warning says why.
- *Waiting for the device.* The host waits for it before the forward, to find the scored positions.
  It does not wait again for the same tensors while they are unchanged.
- *Result.* fp32 (fp64 for an fp64 model), and in nats.
"""

from sap_fast.losses.aligned import kl_loss
from sap_fast.losses.batches import IGNORE_INDEX, Batch
from sap_fast.losses.pairs import (
    contrastive_loss,
    difference_loss,
    joint_loss,
    refusal_loss,
)
from sap_fast.losses.scoring import Reduction, response_log_probs
from sap_fast.losses.task import task_loss

__all__ = [
    "IGNORE_INDEX",
    "Batch",
    "Reduction",
    "contrastive_loss",
    "difference_loss",
    "joint_loss",
    "kl_loss",
    "refusal_loss",
    "response_log_probs",
    "task_loss",
]
