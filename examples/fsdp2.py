"""SAP under FSDP2, with a checkpoint that any number of ranks can go on from.

torchrun --nproc-per-node 2 examples/fsdp2.py --tiny
torchrun --nproc-per-node 8 examples/fsdp2.py --model Qwen/Qwen3-8B --checkpoint ./checkpoint
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from common import load_model, parser, safety_pairs, task_batches
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from sap_fast import FusedSAP, ProbeSet, contrastive_loss, task_loss


def train(options: argparse.Namespace) -> None:
    """Train on every rank; save and go on from `options.checkpoint`."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", dist.get_node_local_rank()) if on_gpu else torch.device("cpu")
    model = load_model(options).to(device)

    # The layers first, then the rest; the head stays with the model, not in a group of its own.
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    optimizer = FusedSAP(model.parameters(), ProbeSet(model), lr=1e-5)

    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "sap": optimizer.sap_state,
    }
    if options.checkpoint and Path(options.checkpoint, ".metadata").exists():
        dcp.load(state, checkpoint_id=options.checkpoint)
        set_model_state_dict(model, state["model"])
        set_optimizer_state_dict(model, optimizer, state["optimizer"])

    pairs = safety_pairs(model, dist.get_rank())

    def task(part):
        loss = task_loss(model, part)
        loss.backward()
        return loss

    def safety():
        loss = contrastive_loss(model, *next(pairs))
        loss.backward()
        return loss

    for step, rows in enumerate(task_batches(model, options.steps, dist.get_rank())):
        loss = optimizer.step(task, safety, rows)
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            print(f"step {step + 1}: task loss {loss.item():.4f}")

    if options.checkpoint:
        state["model"] = get_model_state_dict(model)
        state["optimizer"] = get_optimizer_state_dict(model, optimizer)
        dcp.save(state, checkpoint_id=options.checkpoint)


options_parser = parser(__doc__)
options_parser.add_argument("--checkpoint", help="folder to go on from, if it is there; to save to")
arguments = options_parser.parse_args()
dist.init_process_group()
train(arguments)
dist.destroy_process_group()
