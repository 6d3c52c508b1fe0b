"""An adapter merged into its model, or a tuned model with the aligned one it came from."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from sap_fast.cli.console import UserError
from sap_fast.cli.models import load_model
from sap_fast.cli.unfinished import removed_on_failure

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class MergeSettings:
    """What to merge, and how it is written.

    Attributes:
        model: An adapter, or a model of which every parameter was tuned.
        output: The folder to write.
        dtype: A key of `DTYPES`.
        aligned_share: λ: how much of the aligned model to mix in, from 0 to 1.
        base: The aligned model that a full model was tuned from; an adapter knows its own.
        gguf: Also write a .gguf file with matrices of this type, one of `GGUF_TYPES`.
        trust_remote_code: Run Python code that comes with the model.
    """

    model: str
    output: str
    dtype: str = "fp32"
    aligned_share: float = 0.0
    base: str | None = None
    gguf: str | None = None
    trust_remote_code: bool = False


def merge(settings: MergeSettings) -> Path:
    """Merges in fp32, rounds once, and checks the folder by loading it back.

    Args:
        settings: what to do.

    Returns:
        The folder, which `from_pretrained` loads without PEFT.

    Raises:
        UserError: for a model that cannot be loaded, merged or written as GGUF, an output that is
            in the way, or values that the dtype cannot hold.
        OSError: for an output folder that cannot be written.
    """
    output = Path(settings.output)
    if output.exists():
        raise UserError(f"--output {output}: exists already; remove it or choose another folder")
    if settings.gguf is not None and find_spec("gguf") is None:
        raise UserError(f"--gguf {settings.gguf}: needs gguf: pip install 'sap-fast[gguf]'")
    work = output.with_name(output.name + ".unfinished")
    shutil.rmtree(work, ignore_errors=True)
    with removed_on_failure(work, keep=lambda: False):
        # Before the work, which would be lost.
        work.mkdir(parents=True)
        model, tokenizer = load_model(
            settings.model, "fp32", trust_remote_code=settings.trust_remote_code
        )
        merged = _merged(settings, model)
        if settings.gguf is not None:
            _write_gguf(work / f"{output.name}-{settings.gguf}.gguf", merged, tokenizer, settings)
        merged = merged.to(DTYPES[settings.dtype])
        for name, tensor in merged.named_parameters():
            if not bool(tensor.isfinite().all()):
                raise UserError(
                    f"--dtype {settings.dtype}: {name} has values that it cannot hold; choose bf16 "
                    "or fp32"
                )
        cast(Any, merged).save_pretrained(work)
        tokenizer.save_pretrained(work)
        _check(work, merged, settings)
        work.rename(output)
    return output


def _merged(settings: MergeSettings, model: nn.Module) -> nn.Module:
    from sap_fast.baselines import merge_with_aligned

    is_adapter = hasattr(model, "peft_config")
    share = settings.aligned_share
    aligned: dict[str, Tensor] | None = None
    if is_adapter and settings.base is not None:
        raise UserError(f"--base {settings.base}: {settings.model} is an adapter, with its own")
    if not is_adapter:
        if settings.base is None or share == 0:
            raise UserError(
                f"--model {settings.model}: is no adapter; merging it with the aligned model that "
                "it was tuned from needs --base and an --aligned-share > 0"
            )
        aligned = _aligned(settings.base, settings.trust_remote_code)
    if share > 0:
        try:
            merge_with_aligned(model, aligned, share)
        except ValueError as error:
            raise UserError(f"--aligned-share {share}: {error}") from error
    return cast(Any, model).merge_and_unload() if is_adapter else model


def _write_gguf(path: Path, merged: nn.Module, tokenizer: Any, settings: MergeSettings) -> None:
    from sap_fast.integrations.gguf import GgufError, write_gguf

    assert settings.gguf is not None
    try:
        write_gguf(path, merged.cpu(), tokenizer, settings.gguf)
    except GgufError as error:
        raise UserError(f"--gguf {settings.gguf}: {error}") from error


def _aligned(name: str, trust_remote_code: bool) -> dict[str, Tensor]:
    try:
        base, _ = load_model(name, "fp32", trust_remote_code=trust_remote_code)
    except UserError as error:
        raise UserError(str(error).replace("--model", "--base", 1)) from error
    return base.state_dict()


def _check(folder: Path, merged: nn.Module, settings: MergeSettings) -> None:
    """Raises a `UserError` unless the folder loads to the same weights."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=DTYPES[settings.dtype],
        use_safetensors=True,
        trust_remote_code=settings.trust_remote_code,
    )
    mine = dict(merged.named_parameters())
    for name, tensor in loaded.named_parameters():
        if name not in mine or not torch.equal(tensor, mine[name].cpu()):
            raise UserError(
                f"--output {settings.output}: what was written does not load to the merged "
                f"weights ({name} differs), so it was removed"
            )
