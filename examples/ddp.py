"""DistributedDataParallel: the probe set gets the wrapped model, and the loop is that of one rank.

torchrun --nproc-per-node 2 examples/ddp.py --tiny
"""

import argparse
import gc

import torch
import torch.distributed as dist
from common import load_model, parser, safety_pairs, task_batches
from torch.nn.parallel import DistributedDataParallel

from sap_fast import FusedSAP, ProbeSet, contrastive_loss, task_loss


def train(options: argparse.Namespace) -> None:
    """Run the steps on this rank."""
    on_gpu = torch.cuda.is_available()
    inner = load_model(options)
    inner.to(torch.device("cuda", dist.get_node_local_rank()) if on_gpu else "cpu")
    model = DistributedDataParallel(inner)
    optimizer = FusedSAP(inner.parameters(), ProbeSet(model), lr=1e-5)
    pairs = safety_pairs(inner, dist.get_rank())

    def task(part):
        loss = task_loss(model, part)
        loss.backward()
        return loss

    def safety():
        loss = contrastive_loss(model, *next(pairs))
        loss.backward()
        return loss

    for step, rows in enumerate(task_batches(inner, options.steps, dist.get_rank())):
        loss = optimizer.step(task, safety, rows)
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            print(f"step {step + 1}: task loss {loss.item():.4f}")


arguments = parser(__doc__).parse_args()
dist.init_process_group()
train(arguments)
gc.collect()  # a wrapped model left in reference cycles keeps gloo's threads, which end in an abort
dist.destroy_process_group()
