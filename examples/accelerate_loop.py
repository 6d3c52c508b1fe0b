"""Accelerate, with two micro-batches to a step. Keep the `FusedSAP`: `prepare` wraps it.

The wrapper's `step` hands on one closure and SAP has two, so the loop owns its backward.

accelerate launch examples/accelerate_loop.py --tiny
"""

from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from common import encoded_rows, load_model, parser, safety_pairs
from torch.utils.data import DataLoader

from sap_fast import FusedSAP, ProbeSet, contrastive_loss, task_loss
from sap_fast.data import TaskCollator

MICRO_BATCHES = 2


def train() -> None:
    """Run the steps on this process."""
    options = parser(__doc__).parse_args()
    # A window is fetched before its first micro-batch runs. So the end of the loader must not end
    # a step, as it does by default.
    accelerator = Accelerator(
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=MICRO_BATCHES, sync_with_dataloader=False
        )
    )
    inner = load_model(options)
    sap = FusedSAP(inner.parameters(), ProbeSet(inner), lr=1e-5, grad_scaler=accelerator.scaler)
    rows = encoded_rows(inner, 0, 4 * MICRO_BATCHES * options.steps * accelerator.num_processes)
    loader = DataLoader(rows, batch_size=4, collate_fn=TaskCollator(pad_token_id=0))
    model, optimizer, loader = accelerator.prepare(inner, sap, loader)
    sap.runs_in(model)  # on several processes it is in a DistributedDataParallel now

    pairs = safety_pairs(inner, accelerator.process_index)

    # `backward` divides by the number of micro-batches: a part of them, or one safety loss, counts
    # as a whole step.
    def backward(loss, parts):
        accelerator.backward(loss * MICRO_BATCHES / parts)
        return loss.detach() / parts

    def task(part):
        return sum(backward(task_loss(model, rows), len(part)) for rows in part)

    def safety():
        return backward(contrastive_loss(model, *next(pairs)), 1)

    for step, window in enumerate(zip(*[iter(loader)] * MICRO_BATCHES, strict=True)):
        sap.inner_passes(task, safety, window)
        for micro_batch in window:
            with accelerator.accumulate(model):
                with sap.task_pass() as record:
                    record(backward(task_loss(model, micro_batch), MICRO_BATCHES))
                optimizer.step()  # nothing until the window is complete
                optimizer.zero_grad()
        accelerator.print(f"step {step + 1}: task loss {sap.metrics.task_loss:.4f}")
    accelerator.end_training()


train()
