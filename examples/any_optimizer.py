"""SAP with an optimizer that is not of this package.

python examples/any_optimizer.py --tiny
python examples/any_optimizer.py --tiny --optimizer bitsandbytes
"""

import torch
from common import load_model, parser, safety_pairs, task_batches

from sap_fast import ProbeSet, SafetyPasses, contrastive_loss, task_loss


def optimizers_of(model, name):
    """The optimizer of a name. Muon takes the matrices of the layers, and SGD the rest."""
    if name == "muon":
        matrices = [p for layer in model.model.layers for p in layer.parameters() if p.dim() == 2]
        known = set(matrices)
        others = [p for p in model.parameters() if p not in known]
        return [torch.optim.Muon(matrices, lr=1e-3), torch.optim.SGD(others, lr=1e-2)]
    if name == "torchao":
        from torchao.optim import AdamW8bit as Kind
    elif name == "bitsandbytes":
        from bitsandbytes.optim import AdamW8bit as Kind
    elif name == "paged":
        from bitsandbytes.optim import PagedAdamW8bit as Kind
    else:
        from schedulefree import AdamWScheduleFree as Kind
    optimizer = Kind(model.parameters(), lr=1e-4)
    if name == "schedulefree":
        optimizer.train()  # and eval() before the model is evaluated or saved
    return [optimizer]


CHOICES = ("muon", "bitsandbytes", "paged", "torchao", "schedulefree")
arguments = parser(__doc__)
arguments.add_argument("--optimizer", choices=CHOICES, default="muon", help="default: muon")
options = arguments.parse_args()
model = load_model(options).to("cuda" if torch.cuda.is_available() else "cpu")
pairs = safety_pairs(model)
optimizers = optimizers_of(model, options.optimizer)
# One direction and one probe for all that is trained, whoever updates it.
groups = [group for optimizer in optimizers for group in optimizer.param_groups]
passes = SafetyPasses(groups, ProbeSet(model), safety_weight=0.1)


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
