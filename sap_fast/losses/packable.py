"""Which models compute for packed sequences what they compute for a row of each."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sap_fast.configuration import text_config
from sap_fast.losses.aside import aside
from sap_fast.losses.packing import (
    Packed,
    Sequences,
    flatten,
    is_flash,
    logits_of,
    mask_dtype,
    running,
)
from sap_fast.losses.row_reader import all_modules, row_reader

# Models for which a packed forward gave the log-probabilities of a plain one: in evaluation mode,
# and in training mode. Those for which it did not, and those that were told to have hooks.
_packable: tuple[WeakSet[nn.Module], ...] = (WeakSet(), WeakSet())
_unpackable: WeakSet[nn.Module] = WeakSet()
_told: WeakSet[nn.Module] = WeakSet()


def usable(model: nn.Module, causal_lm: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Says whether packing leaves the result as it is, by the configuration and by a test.

    Nothing may read a row: a hook (of others than this package), a wrapped forward, an adapter that
    looks for tokens in the row. The test runs at the first call for a model of which that is true,
    in evaluation and in training mode. It costs three forwards of some 50 tokens. It does not
    depend on the batch, so that all ranks of a sharded model, whose forwards communicate, run it at
    the same call.

    Args:
        model: The model as it was given, wrappers included.
        causal_lm: The model inside the wrappers.
        batch: The batch that is to be packed.
    """
    if causal_lm in _unpackable or not _is_allowed(model, causal_lm, batch):
        return False
    reader = row_reader(model)
    if reader is not None:
        if causal_lm not in _told:
            _told.add(causal_lm)
            _warn(
                causal_lm,
                f"{reader} may read rows, and packed rows are not those of the batch (a hook that "
                "reads none says so: hook.reads_no_rows = True)",
            )
        return False
    if causal_lm not in _packable[causal_lm.training]:
        reason = _test(model, causal_lm, batch["input_ids"].device)
        if reason is not None:
            _unpackable.add(causal_lm)
            _warn(causal_lm, reason)
            return False
        _packable[causal_lm.training].add(causal_lm)
    return True


def _warn(causal_lm: nn.Module, reason: str) -> None:
    warnings.warn(
        f"{type(causal_lm).__name__}: {reason}. Batches are not packed: tokens that sequences "
        "share are computed for each of them, and padding too. pack=False leaves this message out.",
        stacklevel=6,
    )


def _is_allowed(model: nn.Module, causal_lm: nn.Module, batch: Mapping[str, Any]) -> bool:
    # Not imported here: a model of transformers exists only where that was imported already.
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(causal_lm, transformers.PreTrainedModel):
        return False
    tensors = {key for key, value in batch.items() if isinstance(value, Tensor)}
    if tensors | {"attention_mask"} != {"input_ids", "attention_mask", "labels"}:
        return False  # what else there is for each token would have to be packed, too
    accepted = set(inspect.signature(causal_lm.forward).parameters)
    config = text_config(causal_lm)
    # Flash attention is told where each sequence lies, and counts a window from there.
    flash = is_flash(config._attn_implementation)
    window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    kinds = set(getattr(config, "layer_types", None) or ())
    known = {"full_attention", "sliding_attention"} if flash else {"full_attention"}
    return (
        (flash or config._attn_implementation in ("sdpa", "eager"))  # flex takes neither
        and (flash or not window)
        and kinds <= known  # others count along the row, or mix all that lies in it
        and not getattr(causal_lm, "_is_stateful", False)
        and not getattr(config, "is_encoder_decoder", False)
        and not getattr(config, "output_router_logits", False)  # its loss is a mean over the slots
        and getattr(config, "hidden_size", None) is not None
        and {"position_ids", "attention_mask"} <= accepted
        and not _is_compiled_around_the_layers(model)
        # Virtual tokens in front of the row (PEFT's prompt and prefix tuning) shift what the mask
        # is for.
        and not any("prompt_encoder" in module._modules for module in all_modules(model))
    )


def _is_compiled_around_the_layers(model: nn.Module) -> bool:
    """Says whether what prepares mask and positions for the layers is compiled.

    It is compiled again for masks and positions of each kind. Layers that are compiled by
    themselves are given what a mask of four axes gives them anyway.
    """
    outside = [model]
    for module in outside:  # grows meanwhile
        children = module._modules
        if module._compiled_call_impl is not None or "_orig_mod" in children:
            return True
        if not isinstance(module, nn.ModuleList):
            outside += [child for child in children.values() if child is not None]
    return False


# ---- the test ----


def _test(model: nn.Module, causal_lm: Any, device: torch.device) -> str | None:
    """Says why packing does not give a model's log-probabilities, or None if it does.

    A plain and a packed forward differ by rounding (in bf16 by some 1e-2 of what the context
    changes) where the model obeys the mask, and by all that the context changes where it does not.
    How much that is depends on the model and is measured by a third forward, with the plain causal
    mask over the packed rows. Medians, since one rounding can tip a router's choice. The model is
    in the mode that it will be packed in, its random numbers made equal.
    """
    vocabulary = text_config(causal_lm).vocab_size
    tokens = torch.randint(vocabulary, (5, 14), generator=torch.Generator().manual_seed(0))
    tokens[1, :6] = tokens[0, :6]  # a prompt with two answers
    tokens[2, :9] = tokens[1, :9]  # and a branch inside the second
    attended = torch.arange(14) < torch.tensor([14, 11, 14, 13, 14])[:, None]
    packed, blind = _packed_and_blind(tokens, attended, mask_dtype(causal_lm), device)
    tokens, attended = tokens.to(device), attended.to(device)
    plain = {"input_ids": tokens, "attention_mask": attended.long()}
    packed_rows = packed.token_index[attended]
    # Only those with more than their own sequence before them: the others don't need the mask.
    length = packed.inputs["input_ids"].shape[1]
    masked = packed.inputs["position_ids"].flatten()[packed_rows] < packed_rows % length
    packed_rows = packed_rows[masked]
    plain_rows = attended.flatten().nonzero()[masked, 0]

    told = "a 4-D mask" if "attention_mask" in packed.inputs else "the bounds of sequences"

    accepted = inspect.signature(causal_lm.forward).parameters
    without_cache = {"use_cache": False} if "use_cache" in accepted else {}

    def log_probs(inputs: dict[str, Any], rows: Tensor) -> Tensor:
        with EqualRandomNumbers():
            logits = logits_of(model(**inputs, **without_cache))
        return logits.flatten(0, 1)[rows.to(logits.device)].float().log_softmax(-1)

    with aside(model, device):
        readers: list[str] = []
        with _looking(model, causal_lm, readers):
            expected = log_probs(plain, plain_rows)
        if readers:
            return f"{readers[0]}, there in the forward alone, may read rows"
        try:
            with running(packed.token_index):
                right = log_probs(packed.inputs, packed_rows)
            wrong = log_probs(blind, packed_rows)
        except torch.OutOfMemoryError:
            raise  # says nothing about the model
        except Exception as error:  # whatever a model makes of a mask that it does not know
            return f"a forward with position_ids and {told} fails ({error})"
    difference, effect = ((x - expected).abs().median().item() for x in (right, wrong))
    if not difference <= 0.1 * effect:
        return (
            f"a forward with position_ids and {told} changes log-probabilities by "
            f"{difference:.2g} in the median (by {effect:.2g} with the wrong mask)"
        )
    return None


def _packed_and_blind(
    tokens: Tensor, attended: Tensor, mask: torch.dtype | None, device: torch.device
) -> tuple[Packed, dict[str, Any]]:
    """Packs a batch; returns it, and its inputs as if each row held one sequence."""
    if mask is None:
        packed = flatten(tokens, attended, device)
        slots = packed.inputs["input_ids"].shape[1]
        bounds = torch.tensor([0, slots], dtype=torch.int32, device=device)
        blind = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), bounds)
        return packed, packed.inputs | blind | {"max_length_q": slots, "max_length_k": slots}
    sequences = Sequences(tokens, attended)
    packed = sequences.lay_out(sequences.cut(40), mask, device)
    return packed, {
        **packed.inputs,
        "attention_mask": torch.ones_like(packed.inputs["input_ids"]),
    }


class _looking:
    """Looks for row readers while a forward runs: PEFT puts some of its hooks there and back."""

    def __init__(self, model: nn.Module, causal_lm: Any, found: list[str]) -> None:
        self._model, self._causal_lm, self._found = model, causal_lm, found

    def __enter__(self) -> None:
        get_head = getattr(self._causal_lm, "get_output_embeddings", None)
        places = [self._causal_lm, get_head() if get_head is not None else None]
        self._handles = [
            place.register_forward_pre_hook(self._look) for place in places if place is not None
        ]

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _look(self, *_: Any) -> None:
        if (reader := row_reader(self._model)) is not None:
            self._found.append(reader)


class EqualRandomNumbers(TorchFunctionMode):
    """Makes random numbers of any shape equal, and dropout do nothing.

    A plain and a packed forward draw numbers of other shapes, and so differ even where each token
    is treated alike. Numbers that are drawn in ways not known here stay as they are.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Runs an operation of torch, or what stands for it."""
        kwargs = dict(kwargs or {})
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            if len(args) > 4:
                args = (*args[:4], 0.0, *args[5:])
            else:
                kwargs["dropout_p"] = 0.0
        result = func(*args, **kwargs)
        if func in _CONSTANTS:
            return result.fill_(_CONSTANTS[func])
        if func is Tensor.uniform_:
            low, high = _two(args, kwargs, ("from", 0.0), ("to", 1.0))
            return result.copy_(torch.as_tensor(low + 0.75 * (high - low)))
        if func is Tensor.normal_:
            mean, deviation = _two(args, kwargs, ("mean", 0.0), ("std", 1.0))
            return result.copy_(torch.as_tensor(mean + deviation))
        return result


_DROPOUTS = {
    torch.dropout,
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.alpha_dropout,
    F.feature_alpha_dropout,
}
_CONSTANTS: dict[Any, float] = {
    torch.rand: 0.75,
    torch.rand_like: 0.75,
    torch.randn: 1.0,
    torch.randn_like: 1.0,
    torch.bernoulli: 1.0,
    Tensor.bernoulli: 1.0,
    Tensor.bernoulli_: 1.0,
}


def _two(args: Any, kwargs: Any, *names: tuple[str, float]) -> tuple[Any, ...]:
    given = dict(zip((name for name, _ in names), args[1:3], strict=False))
    return tuple((given | kwargs).get(name, default) for name, default in names)
