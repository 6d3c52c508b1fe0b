"""A loop of one's own, with full parameters; in fp16 with a GradScaler where there is a GPU.

python examples/plain_loop.py --tiny
python examples/plain_loop.py --tiny --blend
"""

import torch
from common import load_model, parser, safety_pairs, task_batches

from sap_fast import (
    BlendedAdamW,
    FusedSAP,
    ProbeSet,
    contrastive_loss,
    joint_loss,
    task_loss,
)

arguments = parser(__doc__)
arguments.add_argument("--blend", action="store_true", help="blend, without a probe")
options = arguments.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"
model = load_model(options).to(device)
pairs = safety_pairs(model)
# Without a GPU it is switched off, and the loop is the same.
scaler = torch.amp.GradScaler(device, enabled=device == "cuda")
if options.blend:
    optimizer = BlendedAdamW(model.parameters(), lr=1e-5, grad_scaler=scaler)
    safety_loss = joint_loss
else:
    optimizer = FusedSAP(model.parameters(), ProbeSet(model), lr=1e-5, grad_scaler=scaler)
    safety_loss = contrastive_loss


def task(part):
    """Run forward and backward on a batch, or on the rows of it that are asked for."""
    with torch.autocast(device, torch.float16, enabled=device == "cuda"):
        loss = task_loss(model, part)
    scaler.scale(loss).backward()
    return loss


def safety():
    """Run forward and backward on the next pairs."""
    with torch.autocast(device, torch.float16, enabled=device == "cuda"):
        loss = safety_loss(model, *next(pairs))
    scaler.scale(loss).backward()
    return loss


for rows in task_batches(model, options.steps):
    optimizer.inner_passes(task, safety, rows)
    with optimizer.task_pass() as record:
        record(task(rows))
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    metrics = optimizer.metrics
    print(f"task loss {metrics.task_loss:.4f}, safety loss {metrics.safety_loss:.4f}")
