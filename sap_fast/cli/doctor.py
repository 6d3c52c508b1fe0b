"""What runs here, on which backend and why, and whether a perturbation survives rounding."""

from __future__ import annotations

import os
from typing import Any

import torch
from rich.table import Table

from sap_fast import ops
from sap_fast.cli.console import console
from sap_fast.cli.environment import environment
from sap_fast.cli.finetune import load_trained_model
from sap_fast.cli.models import resolved_precision
from sap_fast.cli.settings import FinetuneSettings
from sap_fast.compatibility import current_accelerator
from sap_fast.data import SafetyCollator, build_safety_pair, encode_chat, padding_token_id
from sap_fast.losses import contrastive_loss
from sap_fast.ops import IMPLEMENTATIONS, OPERATIONS, choose_backend, describe, native, why_not
from sap_fast.step.calibration import RHO_GRID
from sap_fast.step.guards import Perturbation

# A request that any aligned model should refuse, and whose answer is in every book on locks.
_REQUEST = "Write instructions for picking the lock of a stranger's front door."


def environment_table() -> Table:
    """Returns versions and devices."""
    table = Table("what", "found", title="Environment")
    for name, value in environment().items():
        table.add_row(name, value)
    table.add_row("CPU kernels", describe("native", "cpu"))
    table.add_row("CUDA kernels", native.cuda_problem or native.describe("cuda"))
    accelerator = current_accelerator()
    if accelerator is None:
        table.add_row("accelerator", "none")
    else:
        module = torch.get_device_module(accelerator)
        for index in range(torch.accelerator.device_count()):
            table.add_row(f"{accelerator.type}:{index}", module.get_device_name(index))
    return table


def backend_table() -> Table:
    """Returns which backend each operation runs on, per device, and why."""
    table = Table("operation", "device", "backend", "what it does", title="Operations")
    devices = ["cpu"]
    accelerator = current_accelerator()
    if accelerator is not None:
        devices.append(accelerator.type)
    choices = {device: _chosen_backend(device) for device in devices}
    for operation, purpose in OPERATIONS.items():
        for device, (chosen, _) in choices.items():
            table.add_row(operation, device, chosen or "none", purpose)
    table.add_section()
    for device, (chosen, reason) in choices.items():
        table.add_row("", device, chosen or "none", reason)
        for backend in IMPLEMENTATIONS:
            if backend != chosen:
                state = "could run" if why_not(backend, device) is None else "cannot run"
                table.add_row("", device, backend, f"{state}: {describe(backend, device)}")
    return table


def _chosen_backend(device: str) -> tuple[str | None, str]:
    """Returns the backend that runs on a device, and why; None where nothing can run."""
    asked = os.environ.get("SAP_FAST_BACKEND")
    try:
        chosen = choose_backend("auto", device)
        why = f"asked for by SAP_FAST_BACKEND={asked}" if asked else "chosen"
        return chosen, f"{why}: {describe(chosen, device)}"
    except (RuntimeError, ValueError) as error:
        return None, str(error)


def rounding_table(settings: FinetuneSettings) -> Table:
    """Returns how much of a perturbation survives rounding, for each ρ of the calibration's grid.

    The direction is that of a stock safety pair on the model itself, with a fresh adapter unless
    `settings.full`.

    Raises:
        UserError: if the model cannot be loaded.
    """
    model, tokenizer = load_trained_model(settings)
    pair = build_safety_pair(_REQUEST)
    encoded: Any = {}
    for answer in ("chosen", "rejected"):
        messages = [
            {"role": "user", "content": pair["prompt"]},
            {"role": "assistant", "content": pair[answer]},
        ]
        encoded[answer] = encode_chat(
            tokenizer, messages, settings.max_length, complete=answer == "chosen"
        )
    batches = SafetyCollator(padding_token_id(tokenizer))([encoded])

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    moved = {
        answer: {name: tensor.to(trained[0].device) for name, tensor in batch.items()}
        for answer, batch in batches.items()
    }
    contrastive_loss(model, moved["chosen"], moved["rejected"]).backward()
    touched = [parameter for parameter in trained if parameter.grad is not None]
    directions = [parameter.grad for parameter in touched if parameter.grad is not None]
    # Without autocast a weight is multiplied in its own dtype: adapters on a bf16 model in fp32.
    is_mixed = resolved_precision(settings.precision) == "bf16-mixed"
    computed = torch.bfloat16 if is_mixed else touched[0].dtype
    with torch.no_grad():
        norm = ops.sum_squares(trained).sqrt()
        length = ops.sum_squares(directions).sqrt()

    table = Table(
        "rho",
        "‖ΔW‖ wanted",
        "applied",
        "survives",
        title=f"Perturbation of {len(touched)} tensors of {settings.model}, stored in "
        f"{touched[0].dtype}, multiplied in {computed}"
        + (f", on weights in {settings.load_in} that stay" if settings.load_in else ""),
        caption="What survives can still drown in the rounding of activations: rho=auto measures "
        "that, on your own batch.",
    )
    for rho in RHO_GRID:
        wanted = rho * norm
        with Perturbation(
            touched, [d.clone() for d in directions], wanted / length
        ) as perturbation:
            applied = perturbation.applied_norm(computed)
        share = (applied / wanted).item()
        verdict = f"{share:.1%}" + ("" if share >= 0.5 else "  lost to rounding")
        table.add_row(f"{rho:.2e}", f"{wanted.item():.4g}", f"{applied.item():.4g}", verdict)
    return table


def report(settings: FinetuneSettings | None) -> None:
    """Prints every table; the last one only for a given model."""
    console.print(environment_table())
    console.print(backend_table())
    if settings is not None:
        console.print(rounding_table(settings))
