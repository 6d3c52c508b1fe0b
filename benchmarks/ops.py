"""The operations against PyTorch's own on a CPU, in time: five claims, one CSV, one picture.

    python -m benchmarks.ops            everything; --help for less

`benchmarks.gpu` has the table of GPUs, on the same lists.

Every comparison runs its contenders in turn, round after round, in one process, and reports medians
and their ratio. The lists of tensors are

    large   4 tensors of 4096 × 4096
    lora    256 tensors of 8 × 4096
    mixed   2,000 tensors of 16 to 131,072 elements, log-uniform
    single  one tensor of as many elements as `mixed`

Many small tensors are limited by what each of them costs, not by the bandwidth: of such lists the
table has milliseconds and no GB/s. The rounds are run by pytest-benchmark; this file is also its
test module.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks import pictures
from benchmarks.claims import judged
from benchmarks.measuring import seconds_of
from benchmarks.provenance import write_rows
from sap_fast import BlendedAdamW, ops

THREADS = int(os.environ.get("SAP_FAST_BENCHMARK_THREADS", "2"))
ROUNDS = int(os.environ.get("SAP_FAST_BENCHMARK_ROUNDS", "15"))
RHO = 1e-3
ADAMW: dict[str, Any] = {
    "lr": 1e-6,
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.01,
}

Contenders = Mapping[str, Callable[[], object]]


def mixed_sizes() -> list[tuple[int, ...]]:
    """2,000 sizes between 16 and 131,072, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    exponents = 4 + 13 * torch.rand(2000, generator=generator)
    return [(int(size),) for size in 2**exponents]


LISTS: dict[str, list[tuple[int, ...]]] = {
    "large": [(4096, 4096)] * 4,
    "lora": [(8, 4096)] * 256,
    "mixed": mixed_sizes(),
    "single": [(sum(size for (size,) in mixed_sizes()),)],
}
#: Those that are limited by the bandwidth of the memory.
LARGE = ("large", "single")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COMPARED = [(name, kind) for name in ("large", "lora", "mixed") for kind in DTYPES]


class State(NamedTuple):
    """Parameters, and all that the operations need beside them."""

    params: list[Tensor]
    grads: list[Tensor]
    buffers: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]

    @property
    def elements(self) -> int:
        """Number of elements of all parameters."""
        return sum(parameter.numel() for parameter in self.params)

    @property
    def width(self) -> int:
        """Bytes of a parameter's element."""
        return self.params[0].element_size()


def make_state(shapes: list[tuple[int, ...]], dtype: torch.dtype, device: str = "cpu") -> State:
    """Random tensors; moments in fp32."""
    torch.manual_seed(0)

    def filled(dtype: torch.dtype, scale: float) -> list[Tensor]:
        return [
            torch.empty(shape, dtype=dtype, device=device).normal_(0, scale) for shape in shapes
        ]

    moments = filled(torch.float32, 1e-2)
    squares = [tensor.square_() for tensor in filled(torch.float32, 1e-2)]
    steps = [torch.tensor(10.0, device=device) for _ in shapes]
    return State(
        filled(dtype, 0.02), filled(dtype, 1e-2), filled(dtype, 1e-2), moments, squares, steps
    )


def interleaved(
    benchmark: Any, contenders: Contenders, *, turning: bool = True, **facts: Any
) -> None:
    """Run all contenders in every round and keep their seconds for the report.

    Args:
        benchmark: pytest-benchmark's fixture.
        contenders: what runs, by name.
        turning: start with another one in every round; else those that belong together stay in
            their order.
        facts: what `rows` needs to know of the comparison.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)

    def one_round() -> None:
        if turning:
            order.append(order.pop(0))
        for name in order:
            seconds[name].append(seconds_of(contenders[name], "cpu"))

    warm_up = 2
    benchmark.pedantic(one_round, rounds=ROUNDS, warmup_rounds=warm_up)
    COLLECTED.append((facts, {name: values[warm_up:] for name, values in seconds.items()}))


# What the tests below measured: facts of the comparison, and seconds by contender.
COLLECTED: list[tuple[dict[str, Any], dict[str, list[float]]]] = []


@pytest.fixture(autouse=True)
def quiet_machine() -> None:
    """The same number of threads for everybody."""
    torch.set_num_threads(THREADS)


# ---- 1: the swaps against the bandwidth of the machine ----


@pytest.mark.parametrize(("name", "kind"), COMPARED)
def test_swaps(benchmark: Any, name: str, kind: str) -> None:
    """Perturb, reflect and restore beside a STREAM triad over as many bytes."""
    state = make_state(LISTS[name], DTYPES[kind])
    # a ← b + 3·c over arrays of fp32, 12 bytes an element as STREAM counts; every page is touched.
    count = max(1, state.elements * state.width // 4)
    a, b, c = (torch.ones(count) for _ in range(3))
    scale = torch.tensor(1e-3)
    inverse = 1 / -scale
    contenders = {
        "triad": lambda: torch.add(b, c, alpha=3.0, out=a),
        "perturb_swap_": lambda: ops.perturb_swap_(state.params, state.buffers, scale),
        "reflect_": lambda: ops.reflect_(state.params, state.buffers),
        "restore_swap_": lambda: ops.restore_swap_(state.params, state.buffers, inverse),
    }

    moved = {"triad": 12 / 4, "perturb_swap_": 4, "reflect_": 3, "restore_swap_": 4}
    interleaved(
        benchmark,
        contenders,
        turning=False,  # W is back at the end of each round
        claim="1 bandwidth",
        lists=name,
        dtype=kind,
        baseline="triad",
        bytes={each: times * state.elements * state.width for each, times in moved.items()},
    )


# ---- 2: AdamW ----


def torch_fused_adamw(state: State) -> Callable[[], None]:
    """PyTorch's update, which keeps the moments in the dtype of the parameters."""
    dtype = state.params[0].dtype
    moments = [[moment.to(dtype) for moment in moments] for moments in state[3:5]]

    def run() -> None:
        torch._foreach_add_(state.steps, 1)
        torch._fused_adamw_(
            state.params,
            state.grads,
            *moments,
            [],
            state.steps,
            amsgrad=False,
            maximize=False,
            **ADAMW,
        )

    return run


@pytest.mark.parametrize(("name", "kind"), COMPARED)
def test_adamw(benchmark: Any, name: str, kind: str) -> None:
    """The fused update, alone and with all that SAP adds to it, beside PyTorch's."""
    state = make_state(LISTS[name], DTYPES[kind])
    ours = (state.params, state.grads, *state[3:])
    blend, scale = torch.tensor(0.1), torch.tensor(0.5)

    plain = [torch.nn.Parameter(p.clone()) for p in state.params]
    for parameter, gradient in zip(plain, state.grads, strict=True):
        parameter.grad = gradient
    settings = {"lr": 1e-6, "weight_decay": 0.01}
    whole_theirs = torch.optim.AdamW(plain, fused=True, **settings)
    whole_ours = BlendedAdamW(plain, safety_weight=0.0, **settings)
    contenders = {
        "torch._fused_adamw_": torch_fused_adamw(state),
        "adamw_blend_": lambda: ops.adamw_blend_(*ours, **ADAMW),
        "adamw_blend_ + unscale, clip, blend": lambda: ops.adamw_blend_(
            *ours, state.buffers, blend=blend, gradient_scale=scale, **ADAMW
        ),
        "torch.optim.AdamW(fused=True).step": whole_theirs.step,
        "BlendedAdamW.step": whole_ours.step,
    }
    element = state.width
    sizes = {
        "torch._fused_adamw_": 7 * element,
        "torch.optim.AdamW(fused=True).step": 7 * element,
        "adamw_blend_": 3 * element + 16,
        "BlendedAdamW.step": 3 * element + 16,
        "adamw_blend_ + unscale, clip, blend": 4 * element + 16,
    }
    interleaved(
        benchmark,
        contenders,
        claim="2 AdamW",
        lists=name,
        dtype=kind,
        baseline="torch._fused_adamw_",
        baselines={"BlendedAdamW.step": "torch.optim.AdamW(fused=True).step"},
        bytes={each: size * state.elements for each, size in sizes.items()},
    )


# ---- 3: norms ----


@pytest.mark.parametrize(("name", "kind"), COMPARED)
def test_norms(benchmark: Any, name: str, kind: str) -> None:
    """The sum of squares beside PyTorch's norms, and its bits with other numbers of threads."""
    state = make_state(LISTS[name], DTYPES[kind])
    size = state.elements * state.width
    interleaved(
        benchmark,
        {
            "torch._foreach_norm": lambda: torch._foreach_norm(state.params),
            "sum_squares": lambda: ops.sum_squares(state.params),
        },
        claim="3 norms",
        lists=name,
        dtype=kind,
        baseline="torch._foreach_norm",
        bytes={"torch._foreach_norm": size, "sum_squares": size},
    )
    found = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        found.append(ops.sum_squares(state.params))
    assert all(torch.equal(other, found[0]) for other in found)


# ---- 4: all the work on weights of one step ----


def ours_step(state: State) -> Callable[[], None]:
    """What SAP does with the weights in a step of central differences."""

    def run() -> None:
        direction_norm = ops.sum_squares(state.buffers).sqrt()
        scale = RHO * ops.sum_squares(state.params).sqrt() / direction_norm
        ops.perturb_swap_(state.params, state.buffers, scale)
        ops.reflect_(state.params, state.buffers)
        ops.restore_swap_(state.params, state.buffers, -1 / scale)
        ops.adamw_blend_(state.params, state.grads, *state[3:], **ADAMW)

    return run


def foreach_step(state: State) -> Callable[[], None]:
    """The same with PyTorch's operations on lists: one more copy of W, and the fused AdamW."""
    saved = [parameter.clone() for parameter in state.params]
    adamw = torch_fused_adamw(state)

    def run() -> None:
        direction_norm = torch.stack(torch._foreach_norm(state.buffers)).norm()
        norm = torch.stack(torch._foreach_norm(state.params)).norm()
        scale = (RHO * norm / direction_norm).item()
        torch._foreach_copy_(saved, state.params)
        torch._foreach_add_(state.params, state.buffers, alpha=scale)
        torch._foreach_add_(state.params, state.buffers, alpha=-2 * scale)
        torch._foreach_copy_(state.params, saved)
        adamw()

    return run


def published_step(state: State) -> Callable[[], None]:
    """The same as it is usually written: tensor by tensor, in Python."""
    params = [torch.nn.Parameter(parameter) for parameter in state.params]
    adamw = torch.optim.AdamW(params, lr=1e-6, foreach=False)
    for parameter, gradient in zip(params, state.grads, strict=True):
        parameter.grad = gradient

    @torch.no_grad()
    def run() -> None:
        norm = torch.stack([gradient.norm() for gradient in state.buffers]).norm()
        direction = [gradient / (norm + 1e-8) for gradient in state.buffers]
        size = torch.stack([parameter.norm() for parameter in params]).norm()
        saved = [parameter.clone() for parameter in params]
        for parameter, towards in zip(params, direction, strict=True):
            parameter.add_(RHO * size * towards)
        for parameter, towards, original in zip(params, direction, saved, strict=True):
            parameter.copy_(original - RHO * size * towards)
        for parameter, original in zip(params, saved, strict=True):
            parameter.copy_(original)
        adamw.step()

    return run


@pytest.mark.parametrize(("name", "kind"), COMPARED)
def test_step(benchmark: Any, name: str, kind: str) -> None:
    """Norms, perturb, reflect, restore and AdamW: ours, PyTorch's lists, the published style."""
    states = [make_state(LISTS[name], DTYPES[kind]) for _ in range(3)]
    interleaved(
        benchmark,
        {
            "published style": published_step(states[0]),
            "foreach": foreach_step(states[1]),
            "ours": ours_step(states[2]),
        },
        claim="4 step",
        lists=name,
        dtype=kind,
        baseline="ours",
    )


# ---- 5: many tensors beside one ----


@pytest.mark.parametrize("kind", list(DTYPES))
def test_many_tensors(benchmark: Any, kind: str) -> None:
    """2,000 tensors beside one of as many elements."""
    one, many = (make_state(LISTS[name], DTYPES[kind]) for name in ("single", "mixed"))
    scale = torch.tensor(1e-3)
    contenders: dict[str, Callable[[], object]] = {}
    for name, state in (("single", one), ("mixed", many)):

        def swaps(state: State = state) -> None:
            ops.perturb_swap_(state.params, state.buffers, scale)
            ops.restore_swap_(state.params, state.buffers, 1 / scale)

        def adamw(state: State = state) -> None:
            ops.adamw_blend_(state.params, state.grads, *state[3:], **ADAMW)

        def norm(state: State = state) -> None:
            ops.sum_squares(state.params)

        contenders |= {f"swaps {name}": swaps, f"adamw {name}": adamw, f"norm {name}": norm}
    interleaved(
        benchmark,
        contenders,
        claim="5 many tensors",
        lists="mixed",
        dtype=kind,
        baseline="swaps single",
        baselines={"adamw mixed": "adamw single", "norm mixed": "norm single"},
    )


# ---- the table ----


def rows() -> list[dict[str, Any]]:
    """Return a row per contender: times, bandwidth, and the ratio to its baseline."""
    table = []
    for facts, seconds in COLLECTED:
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        large = facts["lists"] in LARGE
        moved = facts.get("bytes", {}) if large else {}
        for name, values in seconds.items():
            baseline = facts.get("baselines", {}).get(name, facts["baseline"])
            ratio = medians[name] / medians[baseline]
            of_bandwidth = facts["claim"] == "1 bandwidth"
            if of_bandwidth and large:
                ratio = moved[name] / medians[name] / (moved[baseline] / medians[baseline])
            low, _, _, high = statistics.quantiles(values, n=5)
            table.append(
                {
                    "claim": facts["claim"],
                    "lists": facts["lists"],
                    "dtype": facts["dtype"],
                    "contender": name,
                    "median_ms": round(1e3 * medians[name], 4),
                    "q20_ms": round(1e3 * low, 4),
                    "q80_ms": round(1e3 * high, 4),
                    "GB_per_s": round(moved[name] / medians[name] / 1e9, 1) if moved else "",
                    "baseline": baseline,
                    "ratio": round(ratio, 3) if large or not of_bandwidth else "",
                    **judged(facts["claim"], name if large or not of_bandwidth else "", ratio),
                    "backend": ops.choose_backend("auto", "cpu"),
                    "threads": THREADS,
                    "rounds": ROUNDS,
                }
            )
    return table


def main() -> int:
    """Run the benchmarks, print the table, write the CSV and the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-k", default="", help="only the tests that match, as in pytest")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    # This module, and not a second copy of it, collects what the tests measure.
    sys.modules["benchmarks.ops"] = sys.modules[__name__]
    arguments = ["-q", "-p", "no:cacheprovider", "-o", "python_files=ops.py", "--benchmark-quiet"]
    status = pytest.main([*arguments, "-k", options.k, __file__])
    table = rows()
    for row in table:
        target = f"  target {row['target']} {row['met']}" if row["target"] != "" else ""
        print(
            f"{row['claim']:15} {row['lists']:7} {row['dtype']} {row['contender']:38} "
            f"{row['median_ms']:9.3f} ms {row['GB_per_s']!s:>6} GB/s  ratio {row['ratio']!s:>6}"
            f"{target}"
        )
    if table and not options.no_write:
        path = write_rows("ops.csv", table)
        print(f"Wrote {path} and {pictures.draw(path)}")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
