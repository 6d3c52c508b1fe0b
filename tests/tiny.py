"""Small random models and batches for the tests, and what they take of memory."""

from __future__ import annotations

import copy
import inspect
import itertools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from sap_fast import FusedSAP, ProbeSet
from sap_fast.ops import choose_backend
from tests.oracle import naive_contrastive_loss, naive_task_loss

VOCABULARY = 128
HIDDEN = 32

Batch = dict[str, Tensor]


def tiny_llama(
    *,
    layers: int = 4,
    dtype: torch.dtype = torch.float32,
    dropout: float = 0.0,
    attention: str = "eager",
    seed: int = 0,
) -> LlamaForCausalLM:
    """A random Llama, in training mode, with weights large enough that layers matter."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_dropout=dropout,
        initializer_range=0.15,
        pad_token_id=0,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config).to(dtype).train()


def with_lora(model: nn.Module, *, dropout: float = 0.0, seed: int = 0) -> PeftModel:
    """LoRA on q and v, with B away from zero, as after some training."""
    config = LoraConfig(
        r=4, lora_alpha=8, lora_dropout=dropout, target_modules=["q_proj", "v_proj"]
    )
    dtype = next(model.parameters()).dtype
    peft = get_peft_model(model, config, autocast_adapter_dtype=False).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return peft.train()


def random_batch(rows: int = 3, length: int = 12, seed: int = 0) -> Batch:
    """Prompts and answers of several lengths, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(1, VOCABULARY, (rows, length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    labels = input_ids.clone()
    for row in range(rows):
        labels[row, : 3 + row % 3] = -100
        if row % 2:
            attention_mask[row, -row - 1 :] = 0
    input_ids[attention_mask == 0] = 0
    labels[attention_mask == 0] = -100
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def encoded(seed: int) -> dict[str, list[int]]:
    """A row of a dataset: random tokens of some length, the first three of them the prompt."""
    generator = torch.Generator().manual_seed(seed)
    length = 6 + seed % 5
    ids = torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()
    return {"input_ids": ids, "labels": [-100] * 3 + ids[3:]}


class Problem(NamedTuple):
    """A model with a task batch and a safety batch."""

    model: nn.Module
    batch: Batch
    chosen: Batch
    rejected: Batch

    @property
    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def copy(self) -> Problem:
        """The same problem with a model of its own."""
        return self._replace(model=copy.deepcopy(self.model))


def problem(
    *,
    lora: bool = True,
    dtype: torch.dtype = torch.float32,
    dropout: float = 0.0,
    layers: int = 4,
    seed: int = 0,
) -> Problem:
    """A tiny Llama, full or with LoRA, and its batches."""
    model: nn.Module = tiny_llama(
        layers=layers, dtype=dtype, dropout=0.0 if lora else dropout, seed=seed
    )
    if lora:
        model = with_lora(model, dropout=dropout, seed=seed)
    batches = (random_batch(seed=10 * seed + k) for k in (1, 2, 3))
    return Problem(model, *batches)


def task(
    case: Problem, batch: Batch | None = None, scaler: torch.amp.GradScaler | None = None
) -> Tensor:
    """A task closure's work: backward on the task loss, and the loss."""
    loss = naive_task_loss(case.model, case.batch if batch is None else batch)
    (loss if scaler is None else scaler.scale(loss)).backward()
    return loss


def safety(case: Problem, scaler: torch.amp.GradScaler | None = None) -> Tensor:
    """A safety closure's work."""
    loss = naive_contrastive_loss(case.model, case.chosen, case.rejected)
    (loss if scaler is None else scaler.scale(loss)).backward()
    return loss


def safety_loss(case: Problem) -> Tensor:
    """L_safe, without a backward."""
    return naive_contrastive_loss(case.model, case.chosen, case.rejected)


def closures(
    case: Problem, scaler: torch.amp.GradScaler | None = None
) -> tuple[Callable[[Batch | None], Tensor], Callable[[], Tensor]]:
    """What `step` and `inner_passes` take: `task(part)` and `safety()`."""
    return lambda part: task(case, part, scaler), lambda: safety(case, scaler)


def sap(case: Problem, probe: dict[str, Any] | None = None, **options: Any) -> FusedSAP:
    """FusedSAP with a probe on layers 1 and 2 that shows in one step.

    Args:
        case: what it trains.
        probe: keywords of `ProbeSet`.
        options: keywords of `FusedSAP`.
    """
    settings: dict[str, Any] = {"layers": [1, 2], "rho": 1e-3, "size": 0.05} | (probe or {})
    return FusedSAP(case.trained, ProbeSet(case.model, **settings), **({"lr": 1e-2} | options))


def step_by_passes(case: Problem, optimizer: Any, batch: Batch | None = None) -> None:
    """One step of a loop that owns its backward."""
    optimizer.inner_passes(*closures(case), batch)
    with optimizer.task_pass() as record:
        record(task(case, batch))
    optimizer.step()


def weights(of: Problem | nn.Module) -> list[Tensor]:
    """Copies of all parameters of a model, or of a problem's."""
    model = of.model if isinstance(of, Problem) else of
    return [parameter.detach().clone() for parameter in model.parameters()]


def two_groups(params: list[nn.Parameter], **options: Any) -> list[dict[str, Any]]:
    """Parameters in two groups, the second of which has settings of its own."""
    half = len(params) // 2
    own = {"lr": 1e-3, "weight_decay": 0.0, "betas": (0.9, 0.99)}
    return [{"params": params[:half]} | options, {"params": params[half:]} | own | options]


def signature(function: Any) -> list[tuple[str, str, Any]]:
    """Names, kinds and defaults of the arguments, in their order."""
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.kind.name, p.default) for p in parameters]


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that a pass must leave as it was."""
    return {
        "parameters": [p.detach().clone() for p in model.parameters()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "random state": torch.get_rng_state(),
        "hooks": [(list(m._forward_hooks), list(m._forward_pre_hooks)) for m in model.modules()],
        "forwards": [vars(m).get("forward") for m in model.modules()],
        "training": [m.training for m in model.modules()],
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    """The model, its gradients and the random state are as in a snapshot, bit for bit."""
    for name, value in snapshot(model).items():
        expected = before[name]
        if name == "random state":
            assert torch.equal(value, expected), name
        elif name in ("parameters", "gradients"):
            for a, b in zip(value, expected, strict=True):
                assert (a is None) == (b is None), name
                assert a is None or torch.equal(a, b), name
        else:
            assert value == expected, name


def distance(actual: list[Tensor], expected: list[Tensor]) -> float:
    """‖a − b‖/‖b‖ over all tensors."""
    pairs = list(zip(actual, expected, strict=True))
    square = sum(((a - b).detach().double() ** 2).sum() for a, b in pairs)
    return float((square / sum((b.detach().double() ** 2).sum() for _, b in pairs)).sqrt())


def assert_same_bits(left: Any, right: Any) -> None:
    """Hold tensors, in nested dicts and lists, to be equal element by element, and all else too."""
    if isinstance(left, Tensor):
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same_bits(left[key], right[key])
    elif isinstance(left, Iterable) and not isinstance(left, str):
        for a, b in zip(left, right, strict=True):
            assert_same_bits(a, b)
    else:
        assert left == right


def norm_of(tensors: list[Tensor]) -> float:
    """The norm of several tensors as of one long vector."""
    return float(torch.cat([tensor.flatten() for tensor in tensors]).norm())


def spread(axes: Sequence[Sequence[Any]], quick: set[tuple[int, ...]]) -> list[Any]:
    """Every combination of settings, of which those not at the places of `quick` are slow.

    For settings that repeat each other: each on its own is met by the quick ones.
    """
    return [
        pytest.param(
            *(axis[place] for axis, place in zip(axes, places, strict=True)),
            marks=() if places in quick else pytest.mark.slow,
        )
        for places in itertools.product(*(range(len(axis)) for axis in axes))
    ]


def repeated(values: Iterable[Any], quick: Iterable[Any]) -> list[Any]:
    """Settings of one axis, of which those that are not among `quick` are slow."""
    kept = list(quick)
    return [v if v in kept else pytest.param(v, marks=pytest.mark.slow) for v in values]


def plain_adamw(params: Any, **settings: Any) -> torch.optim.AdamW:
    """The AdamW of PyTorch that has the roundings of FusedSAP's on the CPU.

    The native kernels round as `fused=True` does. The reference rounds as the default does, whose
    square root (MKL's) can be off by one unit in the last place.
    """
    return torch.optim.AdamW(params, fused=choose_backend("auto", "cpu") == "native", **settings)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that are made inside and alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)

        def forget() -> None:
            self._known.discard(key)
            self.live -= size

        weakref.finalize(storage, forget)
