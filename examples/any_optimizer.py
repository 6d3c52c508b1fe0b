"""SAP with optimizers that are not of this package: Muon for matrices, SGD for the rest.

python examples/any_optimizer.py --tiny
"""

import torch
from common import load_model, parser, safety_pairs, task_batches

from sap_fast import ProbeSet, SafetyPasses, contrastive_loss, task_loss

options = parser(__doc__).parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"
model = load_model(options).to(device)
pairs = safety_pairs(model)

matrices = [p for layer in model.model.layers for p in layer.parameters() if p.dim() == 2]
known = set(matrices)
others = [p for p in model.parameters() if p not in known]
optimizers = [torch.optim.Muon(matrices, lr=1e-3), torch.optim.SGD(others, lr=1e-2)]
# One direction and one probe for all that is trained, whoever updates it.
passes = SafetyPasses([*matrices, *others], ProbeSet(model), safety_weight=0.1)


def task(part):
    """Run forward and backward on a batch, or on the rows of it that are asked for."""
    loss = task_loss(model, part)
    loss.backward()
    return loss


def safety():
    """Run forward and backward on the next pairs."""
    loss = contrastive_loss(model, *next(pairs))
    loss.backward()
    return loss


for rows in task_batches(model, options.steps):
    passes.inner_passes(task, safety, rows)
    with passes.task_pass() as record:
        record(task(rows))
    passes.blend_()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    passes.end_step()
    metrics = passes.metrics
    print(f"task loss {metrics.task_loss:.4f}, probe sizes {metrics.probe_sizes}")
