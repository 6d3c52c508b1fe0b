"""What differs between the supported versions of other packages, and which versions these are.

Each difference says which version ends it: once the oldest supported version is that or a later
one, its line goes. Nothing here imports the package that it is about before it is asked.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

#: The oldest supported version of each package; `pip install sap-fast[trl]` brings no older one.
OLDEST = {"transformers": "4.57", "peft": "0.17", "accelerate": "1.10", "trl": "0.24"}


def require(*packages: str) -> None:
    """Checks that packages are as new as an integration needs them; one that is missing passes.

    Args:
        packages: Keys of `OLDEST`.

    Raises:
        ImportError: A package is older. The message names it, its version and the cure.
    """
    for package in packages:
        oldest = OLDEST[package]
        try:
            enough = _installed(package, oldest)
        except PackageNotFoundError:
            continue  # Python's own error says so where it is imported
        if not enough:
            raise ImportError(
                f"{package} {version(package)} is too old for sap_fast, which needs {oldest} or "
                f"later: pip install --upgrade '{package}>={oldest}'"
            )


def current_accelerator() -> torch.device | None:
    """Returns the accelerator of this machine, or None where none can be used."""
    # Until torch 2.7 `current_accelerator` cannot be asked for one that is available.
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def max_memory_allocated() -> int:
    """Returns the peak memory of the accelerator in bytes."""
    # Until torch 2.9 only the module of the kind of accelerator counts it.
    counts = torch.accelerator if hasattr(torch.accelerator, "max_memory_allocated") else None
    return (counts or torch.get_device_module()).max_memory_allocated()


def checkpointing_arguments(on: bool) -> dict[str, Any]:
    """Returns the `TrainingArguments` that turn activation checkpointing on or off."""
    from transformers import TrainingArguments

    # Until transformers 5.23 under another name, of which later versions warn.
    if "activation_checkpointing" in TrainingArguments.__dataclass_fields__:
        return {"activation_checkpointing": on}
    return {"gradient_checkpointing": on, "gradient_checkpointing_kwargs": {"use_reentrant": False}}


def checkpoint_without_reentry(args: Any) -> None:
    """Makes the checkpointing of `TrainingArguments` non-reentrant, where they leave it open.

    Reentrant checkpointing finds no gradient where what enters the first layer needs none: with
    LoRA, and in a probe pass.
    """
    # Until transformers 5.0 it is reentrant by default; TRL's trainers ask for it by default.
    if args.gradient_checkpointing and not _installed("transformers", "5.0"):
        given = args.gradient_checkpointing_kwargs or {}
        args.gradient_checkpointing_kwargs = {"use_reentrant": False} | given


def log_into(args: Any, folder: Path) -> None:
    """Has TensorBoard's files put into a folder, where `TrainingArguments` say into which."""
    # Until transformers 5.2; then an environment variable does.
    if hasattr(args, "logging_dir"):
        args.logging_dir = str(folder)


def create_optimizer(create: Any, model: Any) -> Any:
    """Calls `Trainer.create_optimizer` with the model, if one is given."""
    # Until transformers 5.3 it takes none, and trainers of that time give none.
    return create() if model is None else create(model)


def prompts_disabled(adapted: Any) -> bool:
    """Says whether a PEFT model of prompt learning is inside `disable_adapter()`."""
    # Until PEFT 0.18 there is no flag. What the context does is to replace this method.
    flag = getattr(adapted, "_adapters_disabled", None)
    return adapted.forward == adapted.base_model.forward if flag is None else flag


@cache
def prefix_takes_positions() -> bool:
    """Says whether PEFT takes `position_ids` where virtual tokens are keys and values alone."""
    # Until PEFT 0.19 it drops them, and warns.
    return _installed("peft", "0.19")


@contextmanager
def one_sequence_per_row() -> Iterator[None]:
    """Keeps transformers' models from looking for further sequences in rows without a mask.

    They look at the positions in every forward, from transformers 4.53 on, for which the host waits
    for the device.
    """
    masking: Any = sys.modules.get("transformers.masking_utils")
    find = getattr(masking, "find_packed_sequence_indices", None)
    if find is None:
        yield
        return
    masking.find_packed_sequence_indices = _no_sequences
    try:
        yield
    finally:
        masking.find_packed_sequence_indices = find


def _no_sequences(position_ids: Any) -> None:
    """Returns what `transformers.masking_utils` does where every row holds one sequence."""


def _installed(package: str, oldest: str) -> bool:
    from packaging.version import Version

    return Version(version(package)) >= Version(oldest)
