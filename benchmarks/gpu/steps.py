"""Whole steps beside plain AdamW's, and beside those of the best set-up that is known without SAP.

Two bases share their weights. `plain` is transformers' Llama with scaled-dot-product attention.
`strong` is the same with Liger's kernels where that package is there, each layer compiled, and
FlashAttention where that package is there; rows say in `base` what it had. On each run

    HF's loss        what the base's own forward returns, and `torch.optim.AdamW(fused=True)`
    our loss         `task_loss`, and the same AdamW
    blend, sap, …    the optimizer of a recipe

Every step has another batch: rows of several lengths, padded. A window is ten steps, a period of
what takes a direction every tenth step; the configurations take turns, a window each, three times
where the budget of the part allows for it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import itertools
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.gpu.llama import (
    CASES,
    Case,
    backward,
    build_model,
    padded_batch,
    random_pairs,
)
from benchmarks.gpu.parts import Part, Setting, Stage, failure, release
from benchmarks.measuring import quartiles, seconds_of
from benchmarks.workloads import RHO, Batch, Model, Recipe, Row, trained_parameters
from sap_fast import contrastive_loss, joint_loss, task_loss
from sap_fast.model.layers import find_decoder_layers

#: So many that an eighth of them is a row.
ROWS, LENGTH = 8, 512
#: Of a window.
STEPS = 10
#: A turn of a configuration begins with steps that are not timed: they allocate state, and the
#: first ones of all compile.
WARM_UP = {"first": 3, "later": 1}

#: Windows of each configuration, where the budget of the part allows for all of them.
TURNS = 3
#: What compiling for a configuration may take, and times its last turn that the next one may take.
COMPILE_S, MARGIN = 40.0, 1.2

RECIPES = {
    "blend": Recipe("blend"),
    "sap": Recipe(),
    "sap, direction_every=10, rows=1/8": Recipe(direction_every=10, rows=0.125),
}
METHODS = ("HF's loss", "our loss", *RECIPES)


class Base(NamedTuple):
    """A model that steps run on."""

    model: Model
    #: What it has beside transformers' own.
    has: str


# ---- bases ----


def plain_base(case: Case, device: str) -> Base:
    """Return transformers' model."""
    return Base(build_model(case, device), "plain")


def strong_base(case: Case, device: str, plain: Base) -> Base:
    """Return a model that has the plain one's parameters, with all that makes it fast."""
    model = build_model(case, device)
    # The same tensors, so that two bases take the memory of one.
    model.load_state_dict(plain.model.state_dict(keep_vars=True), assign=True)
    causal_lm = model.get_base_model() if case.lora is not None else model
    has = ["strong"]
    if importlib.util.find_spec("liger_kernel") is not None and device != "cpu":
        liger = importlib.import_module("liger_kernel.transformers")
        # Its rotary embedding would be put into the module that the plain model runs, too.
        liger.apply_liger_kernel_to_llama(rope=False, model=causal_lm)
        has.append(f"Liger {importlib.metadata.version('liger-kernel')}")
    if importlib.util.find_spec("flash_attn") is not None and device != "cpu":
        causal_lm.set_attn_implementation("flash_attention_2")
        has.append("FlashAttention")
    # What other configurations compiled is not to count against the limit of this one.
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = 64
    for layer in find_decoder_layers(model)[0]:
        # Without a GPU it is tried whether the layers can be traced; code for them takes minutes.
        layer.compile(backend="eager" if device == "cpu" else "inductor")
    return Base(model, " + ".join([*has, "compiled layers"]))


# ---- configurations ----


class Batches:
    """Batches of a window, each another one, and the pairs."""

    def __init__(self, case: Case, device: str, dry: bool) -> None:
        torch.manual_seed(1)
        vocabulary, length = case.shape.vocabulary, 16 if dry else LENGTH
        self._batches = [
            padded_batch(ROWS, length, vocabulary, device) for _ in range(2 if dry else STEPS)
        ]
        self._pairs = [random_pairs(vocabulary, device, dry) for _ in range(2 if dry else STEPS)]
        self._next = itertools.count()
        #: Tokens of a step, padding left out.
        self.tokens = statistics.mean(int(b["attention_mask"].sum()) for b in self._batches)

    def next(self) -> tuple[Batch, tuple[Batch, Batch]]:
        """Return a batch and pairs that were never seen: what was found out of others is no use."""
        index = next(self._next) % len(self._batches)
        chosen, rejected = self._pairs[index]
        return _fresh(self._batches[index]), (_fresh(chosen), _fresh(rejected))


def _fresh(batch: Batch) -> Batch:
    return {name: tensor.clone() for name, tensor in batch.items()}


@contextmanager
def configuration(
    method: str, base: Base, batches: Batches, device: str
) -> Iterator[Callable[[], None]]:
    """Yield what runs a step of a method on a base, with an optimizer that lives as long."""
    model = base.model
    trained = trained_parameters(model)
    settings: dict[str, Any] = {"lr": 1e-5, "weight_decay": 0.01}
    recipe = RECIPES.get(method)

    def run(loss: Callable[[], Tensor]) -> Tensor:
        return backward(loss, device)

    if recipe is None:
        adamw = torch.optim.AdamW(trained, fused=True, **settings)

        def step() -> None:
            batch, _ = batches.next()
            own = method == "HF's loss"
            run(lambda: model(**batch).loss if own else task_loss(model, batch))
            nn.utils.clip_grad_norm_(trained, 1.0)
            adamw.step()
            adamw.zero_grad()

        yield step
        return
    optimizer = recipe.optimizer(model, rho=RHO, max_grad_norm=1.0, **settings)
    safety_loss = contrastive_loss if recipe.method == "sap" else joint_loss

    def sap_step() -> None:
        batch, pairs = batches.next()
        optimizer.step(
            lambda part: run(lambda: task_loss(model, part)),
            lambda: run(lambda: safety_loss(model, *pairs)),
            batch,
        )
        optimizer.zero_grad()

    try:
        yield sap_step
    finally:
        if optimizer.probes is not None:
            optimizer.probes.detach()


# ---- measuring ----


class Windows:
    """What was measured of a configuration."""

    def __init__(self) -> None:
        self.seconds: list[float] = []  # of a step, one for each window
        self.peak = 0
        self.error: Row = {}
        #: Of the last turn, warm-up included.
        self.turn_s = 0.0


def measure(name: str, setting: Setting) -> list[Row]:
    """Return a row for each method on each base."""
    device, case = setting.device, CASES[name].sized(setting.dry)
    plain = plain_base(case, device)
    bases = {"plain": plain, "strong": strong_base(case, device, plain)}
    batches = Batches(case, device, setting.dry)
    # Those that others are compared with come first: they have most windows if time runs out.
    order = [(base, method) for method in METHODS[:1] for base in bases]
    order += [(base, method) for base in bases for method in METHODS[1:]]
    found = {key: Windows() for key in order}

    def rows() -> list[Row]:
        return [row(case, bases[base], method, batches, found, base) for base, method in order]

    turns = 1 if setting.dry else TURNS
    for _ in range(turns):
        for base, method in order:
            windows = found[base, method]
            if not windows.error and setting.left > time_for(base, windows, found.values()):
                run_turn(windows, method, bases[base], batches, setting)
                setting.save(rows())
    return rows()


def time_for(base: str, windows: Windows, every: Iterable[Windows]) -> float:
    """Return the seconds that have to be left for a turn of a configuration to begin.

    One that may have to be compiled leaves those before it the time for all their windows.
    """
    if windows.seconds:
        return MARGIN * windows.turn_s
    if base == "plain":
        return 0.0
    return COMPILE_S + (TURNS - 1) * sum(w.turn_s for w in every)


def run_turn(windows: Windows, method: str, base: Base, batches: Batches, setting: Setting) -> None:
    """Run a window of a configuration after steps that are not timed."""
    device = setting.device
    base.model.zero_grad()
    release(device)
    count = 1 if setting.dry else STEPS

    def whole() -> None:
        with configuration(method, base, batches, device) as step:
            for _ in range(0 if setting.dry else WARM_UP["later" if windows.seconds else "first"]):
                step()

            def window() -> None:
                for _ in range(count):
                    step()

            windows.seconds.append(seconds_of(window, device) / count)

    try:
        windows.turn_s = seconds_of(whole, device)
    except Exception as error:  # what a base refuses is a result, and what does not fit is one
        windows.error = failure(error)
    else:
        windows.peak = torch.cuda.max_memory_allocated() if device != "cpu" else 0


def row(
    case: Case,
    base: Base,
    method: str,
    batches: Batches,
    found: dict[tuple[str, str], Windows],
    base_name: str,
) -> Row:
    """Return what was measured, also over the base's own step, the plain one and our AdamW."""
    windows = found[base_name, method]
    figures: Row = case.facts() | {"base": base.has, "method": method}
    figures |= {"rows": ROWS, "length": LENGTH}
    if windows.error or not windows.seconds:
        return figures | windows.error
    low, middle, high = quartiles(windows.seconds)
    figures |= {"windows": len(windows.seconds), "steps_of_window": STEPS}
    for column, value in (("step_s", middle), ("q25_s", low), ("q75_s", high)):
        figures[column] = round(value, 4)
    others = {
        "times_base": (base_name, "HF's loss"),
        "times_plain": ("plain", "HF's loss"),
        "times_our_adamw": (base_name, "our loss"),
    }
    for column, key in others.items():
        figures[column] = _ratio(windows.seconds, found[key].seconds)
    return figures | {
        "tokens_per_s": round(batches.tokens / middle),
        "peak_gb": round(windows.peak / 1e9, 2),
    }


def _ratio(above: Sequence[float], below: Sequence[float]) -> float | str:
    """Return the median of the ratios of windows of the same turn."""
    pairs = list(zip(above, below, strict=False))
    return round(statistics.median(a / b for a, b in pairs), 3) if pairs else ""


STAGE = Stage(
    "steps",
    (
        "model",
        "base",
        "method",
        "windows",
        "step_s",
        "times_base",
        "times_plain",
        "times_our_adamw",
        "tokens_per_s",
        "peak_gb",
    ),
    (
        Part("8b-lora", 170, functools.partial(measure, "8b-lora")),
        Part("1b-full", 110, functools.partial(measure, "1b-full")),
    ),
)
