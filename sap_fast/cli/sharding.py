"""What `accelerate launch` asks of a run beside processes: FSDP2, or what there is no way to do.

Accelerate hands its configuration on in environment variables, which its own classes read later:
here they are read before a model is.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from sap_fast.cli.console import UserError
from sap_fast.cli.settings import FinetuneSettings

_INSTEAD = (
    "use FSDP2 (distributed_type: FSDP, with fsdp_version: 2 in fsdp_config) or DDP "
    "(distributed_type: MULTI_GPU)"
)

# Variable → what it stands for, why it is refused.
_REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": (
        "DeepSpeed",
        f"finetune does not drive its engine: {_INSTEAD}",
    ),
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", f"it has models of its own: {_INSTEAD}"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (
        "a parallelism_config",
        "tensor, context and sequence parallelism are not supported: leave it out, "
        "or set use_parallelism_config: false",
    ),
}

# Of fsdp_config, where they are on.
_REFUSED_OF_FSDP = {
    "FSDP_ACTIVATION_CHECKPOINTING": (
        "fsdp_activation_checkpointing",
        "it wraps the probed layers; set it to false, and give --checkpointing layers",
    ),
    "FSDP_OFFLOAD_PARAMS": (
        "fsdp_offload_params",
        "the passes would move every parameter three times a step; set it to false",
    ),
}


def is_asked_for() -> bool:
    """Returns whether Accelerate's configuration asks for FSDP."""
    return _is_on("ACCELERATE_USE_FSDP")


def refuse_what_is_not_supported(settings: FinetuneSettings) -> None:
    """Refuses what a launcher's configuration asks for and the run could not do, by name.

    Raises:
        UserError: saying what to use in its place.
    """
    for variable, (name, why) in _REFUSED.items():
        if _is_on(variable):
            raise UserError(f"Accelerate's configuration asks for {name}, and {why}")
    if not is_asked_for():
        return
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise UserError(
            f"Accelerate's configuration asks for FSDP1 (fsdp_version: {version}), whose flat "
            "parameters are of use in its own passes only; set fsdp_version: 2"
        )
    if not accelerator_is_there():
        raise UserError(
            "Accelerate's configuration asks for FSDP, and there is no accelerator here: "
            "Accelerate shards on accelerators only, and would replicate the model without a word; "
            "use distributed_type: MULTI_CPU"
        )
    for variable, (name, why) in _REFUSED_OF_FSDP.items():
        if _is_on(variable):
            raise UserError(f"{name}: true in Accelerate's configuration: {why}")
    for option, given, why in (
        (
            "--full",
            settings.full or None,
            "Accelerate gives the head a group of shards of its own, and a head that is trained "
            "in one ended the process in the trials; train an adapter",
        ),
        (
            "--save-every",
            settings.save_every,
            "Accelerate's checkpoints of shards leave out what SAP adds to the optimizer",
        ),
        ("--eval", settings.eval, "the held-out rows run on the first rank, which has a shard"),
        (
            "--load-in",
            settings.load_in,
            "quantized weights would not be sharded, and lie whole on every rank",
        ),
    ):
        if given is not None:
            value = "" if given is True else f" {given}"
            raise UserError(f"{option}{value} with FSDP: {why}; leave it out, or use DDP")


def accelerator_is_there() -> bool:
    """Returns whether Accelerate finds what it shards on."""
    return torch.accelerator.is_available()


def whole_state(trainer: Any) -> Mapping[str, Any] | None:
    """Returns the gathered parameters of a sharded model, on the first rank; None of another model.

    Every rank has to call it.
    """
    if not getattr(trainer, "is_fsdp_enabled", False):
        return None
    return trainer.accelerator.get_state_dict(trainer.model)


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"
