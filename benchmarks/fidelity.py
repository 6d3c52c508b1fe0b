"""How true the probe gradient h is: FusedSAP's and the published procedure's against fp64.

The oracle is `tests/oracle.py`: h by fp64 double backward, for the same weights, batches and
dropout masks. Cosine 1 and relative size 1 mean that h is exact; what is far from that is noise.
All probe the layers that are `ProbeSet`'s default, and run padded batches: a packed one draws other
masks than its padded twin, so what is packed is compared without dropout.
Writes `fidelity.csv` with three tables and `fidelity.png`:

* numerics: h of every way to run the probe passes, FusedSAP's and `sap_fast.baselines.published`'s;
* grid: ρ against the cosine and against the agreement, by which `rho="auto"` picks ρ without an
  oracle;
* restore: the share of parameter elements that the probe passes leave changed.
"""

from __future__ import annotations

import argparse
import copy
import csv
import dataclasses
import itertools
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from benchmarks import assets, full_logits, pictures
from benchmarks.provenance import RESULTS, provenance
from benchmarks.workloads import Data, Lora, add_lora
from sap_fast import FusedSAP, ProbeSet, contrastive_loss, task_loss
from sap_fast.baselines.published import published_step
from sap_fast.cli.environment import processor_name
from sap_fast.data import build_safety_pair, encode_chat, padding_token_id
from sap_fast.step.calibration import RHO_GRID
from tests.oracle import cosine, naive_task_loss, oracle_estimate
from tests.tiny import Problem, problem

Estimate = dict[int, Tensor]

# Cosines that FusedSAP's default has to reach with dropout and rho="auto".
REQUIRED = {"fp32": 0.99, "bf16 autocast": 0.95}

PACKED = "central, packed"
# What `ProbeSet` is measured with beside its defaults, which difference centrally.
VARIANTS: dict[str, dict[str, Any]] = {
    "central": {},
    "forward": {"difference": "forward"},
    PACKED: {},
}

# The published ρ, and one that bf16 can see.
PUBLISHED_RHOS = (2e-5, 1e-2)
# Arithmetic and dropout masks of the two probe passes; the last is the published setting.
PUBLISHED_SETTINGS = (
    ("fp32", "same"),
    ("fp32", "different"),
    ("bf16 autocast", "off"),
    ("bf16 autocast", "different"),
)

DROPOUT = 0.1
TASK_ROWS = 4
SAFETY_PAIRS = 4
# Steps of AdamW that take the adapters to where a step of training meets them: at the start LoRA's
# B is zero, and so is the gradient of its A.
WARM_UP_STEPS = 10
WARM_UP_LR = 1e-3
# Different masks make h random: such cosines are means over so many draws.
REPEATS = 3


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the CSV; None where a table does not have the figure.

    Attributes:
        table: `"numerics"`, `"grid"` or `"restore"`.
        config: the model and what of it is trained.
        path: whose passes, and how they difference.
        arithmetic: `"fp32"` or `"bf16 autocast"`; of the restore, `"fp32"` or `"bf16"` throughout.
        dtype: of the parameters.
        dropout: probability; 0 where it was switched off.
        masks: whether the two probe passes met the `"same"` dropout masks or `"different"` ones, or
            `"off"`.
        rho_setting: what the user sets, `"auto"` or a number.
        rho: ρ as used.
        agreement: cosine of h at ρ and at ρ/2: for `"auto"`, as the calibration reports it.
        cosine: of h and the oracle's, all layers as one vector; the mean over `repeats`.
        relative_size: ‖h‖ over the oracle's, likewise.
        lowest_layer_cosine: of the probed layer that does worst, likewise.
        repeats: draws of the dropout masks.
        changed_elements: share of parameter elements that are not what they were before.
    """

    table: str
    config: str
    path: str
    arithmetic: str
    dtype: str
    dropout: float
    masks: str
    rho_setting: str
    rho: float
    agreement: float | None = None
    cosine: float | None = None
    relative_size: float | None = None
    lowest_layer_cosine: float | None = None
    repeats: int | None = None
    changed_elements: float | None = None


class Subject:
    """A model with its batches, held against its oracle.

    Args:
        name: for the tables.
        case: model in training mode, task batch, safety batches.
        seed: of the dropout masks.
    """

    def __init__(self, name: str, case: Problem, seed: int) -> None:
        self.name = name
        self.case = case
        self.seed = seed
        # Safety pass and clean task pass start from here, in the oracle as in what is measured.
        torch.manual_seed(seed)
        self.random_state = torch.get_rng_state()
        self.oracle = self._find_oracle(dropout=True)
        self.oracle_without_dropout = self._find_oracle(dropout=False)

    def measurements(self) -> list[tuple[str, Callable[[], list[Row]]]]:
        """Everything to measure, by what it is called in the progress display."""
        todo: list[tuple[str, Callable[[], list[Row]]]] = []
        for variant, arithmetic in itertools.product(VARIANTS, REQUIRED):
            name = f"FusedSAP, {variant}, {arithmetic}"
            todo.append((name, partial(self.measure_ours, variant, arithmetic)))
        for arithmetic in REQUIRED:
            todo.append((f"grid of ρ, {arithmetic}", partial(self.measure_grid, arithmetic)))
        for arithmetic, masks in PUBLISHED_SETTINGS:
            name = f"published, {arithmetic}, masks: {masks}"
            todo.append((name, partial(self.measure_published, arithmetic, masks)))
        for dtype in (torch.float32, torch.bfloat16):
            todo.append((f"restore, {dtype}", partial(self.measure_restore, dtype)))
        return todo

    def _find_oracle(self, *, dropout: bool) -> Estimate:
        model: Any = copy.deepcopy(self.case.model).double().train(dropout)
        # Fused attention has no second derivative.
        model.set_attn_implementation("eager")
        twin = self.case._replace(model=model)
        probes = ProbeSet(model)
        probes.detach()
        return oracle_estimate(
            lambda: naive_task_loss(model, twin.batch),
            lambda: full_logits.contrastive_loss(model, twin.chosen, twin.rejected),
            twin.trained,
            probes.modules,
            (model.config.hidden_size,),
            self.random_state,
        )

    # ---- FusedSAP ----

    def measure_ours(self, variant: str, arithmetic: str) -> list[Row]:
        """The h of one step as a user runs it, with the learning rate at zero."""
        packed = variant == PACKED
        self.case.model.train(not packed)
        probes = ProbeSet(self.case.model, **VARIANTS[variant])
        optimizer = FusedSAP(self.case.trained, probes, lr=0.0)
        torch.set_rng_state(self.random_state)
        optimizer.step(*self._closures(arithmetic, pack=packed))
        optimizer.zero_grad()
        probes.detach()
        self.case.model.train()
        calibration = optimizer.passes.calibration
        assert calibration is not None
        masks, oracle = ("off", self.oracle_without_dropout) if packed else ("same", self.oracle)
        row = self._row("numerics", f"FusedSAP, {variant}", arithmetic, masks, calibration.rho)
        figures = compare([probes.estimates], oracle)
        agreement = calibration.agreement
        return [dataclasses.replace(row, rho_setting="auto", agreement=agreement, **figures)]

    def measure_grid(self, arithmetic: str) -> list[Row]:
        """The h of central differences for every ρ that the calibration tries."""
        probes = ProbeSet(self.case.model)
        passes = FusedSAP(self.case.trained, probes, lr=0.0).passes
        passes.keeps_direction = True  # keeps the direction for all of them
        torch.set_rng_state(self.random_state)
        task, safety = self._closures(arithmetic)
        passes.safety_pass(safety)
        found: list[Estimate] = []
        for rho in RHO_GRID:
            probes.rho = rho
            passes.probe_passes(lambda _: task())
            found.append(probes.estimates)
        probes.detach()
        return [
            dataclasses.replace(
                self._row("grid", "FusedSAP, central", arithmetic, "same", rho),
                agreement=cosine(found[k], found[k + 1]) if k + 1 < len(found) else None,
                **compare([found[k]], self.oracle),
            )
            for k, rho in enumerate(RHO_GRID)
        ]

    def _closures(
        self, arithmetic: str, case: Problem | None = None, *, pack: bool = False
    ) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
        case = case or self.case
        model, pairs = case.model, (case.chosen, case.rejected)
        return (
            backward(lambda: task_loss(model, case.batch, pack=pack), arithmetic),
            backward(lambda: contrastive_loss(model, *pairs, pack=pack), arithmetic),
        )

    # ---- the published procedure ----

    def measure_published(self, arithmetic: str, masks: str) -> list[Row]:
        """The h of the authors' released procedure: the difference of two task passes over ρ‖W‖."""
        oracle = self.oracle_without_dropout if masks == "off" else self.oracle
        rows = []
        for rho in PUBLISHED_RHOS:
            found = []
            for repeat in range(REPEATS if masks == "different" else 1):
                case = self.case.copy()  # its restore loses bits
                case.model.train(masks != "off")
                probes = ProbeSet(case.model)
                torch.set_rng_state(self.random_state)
                draw = partial(self._draw_masks, masks, repeat, itertools.count())
                run_published(case, probes, arithmetic, rho, draw)
                found.append(probes.estimates)
            row = self._row("numerics", "published", arithmetic, masks, rho)
            rows.append(dataclasses.replace(row, **compare(found, oracle)))
        return rows

    def _draw_masks(self, masks: str, repeat: int, calls: Iterator[int]) -> None:
        """Let a task pass draw the oracle's masks; the first, at W + ΔW, others if asked for."""
        torch.set_rng_state(self.random_state)
        if next(calls) == 0 and masks == "different":
            torch.manual_seed(self.seed + 1 + repeat)

    # ---- restore ----

    def measure_restore(self, dtype: torch.dtype) -> list[Row]:
        """What is left of the perturbation after the probe passes, in parameters of a dtype."""
        arithmetic = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
        rows = []
        for rho in PUBLISHED_RHOS:
            case = self.case._replace(model=copy.deepcopy(self.case.model).to(dtype))
            before = [parameter.detach().clone() for parameter in case.trained]

            probes = ProbeSet(case.model, rho=rho)
            passes = FusedSAP(case.trained, probes, lr=0.0).passes
            task, safety = self._closures(arithmetic, case)
            passes.safety_pass(safety)
            passes.probe_passes(lambda _, task=task: task())
            probes.detach()
            ours = changed_share(before, case.trained)

            run_published(case, ProbeSet(case.model), arithmetic, rho)
            theirs = changed_share(before, case.trained)
            for path, share in (("FusedSAP, central", ours), ("published", theirs)):
                row = self._row("restore", path, arithmetic, "same", rho)
                rows.append(
                    dataclasses.replace(
                        row, dtype=str(dtype).removeprefix("torch."), changed_elements=share
                    )
                )
        return rows

    def _row(self, table: str, path: str, arithmetic: str, masks: str, rho: float) -> Row:
        return Row(
            table=table,
            config=self.name,
            path=path,
            arithmetic=arithmetic,
            dtype="float32",
            dropout=0.0 if masks == "off" else DROPOUT,
            masks=masks,
            rho_setting=f"{rho:g}",
            rho=rho,
        )


def backward(loss: Callable[[], Tensor], arithmetic: str) -> Callable[[], Tensor]:
    """Return a closure that runs forward and backward, in bf16 autocast if that is asked for."""

    def closure() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=arithmetic == "bf16 autocast"):
            value = loss()
        value.backward()
        return value.detach()

    return closure


def run_published(
    case: Problem,
    probes: ProbeSet,
    arithmetic: str,
    rho: float,
    before_task: Callable[[], None] = lambda: None,
) -> None:
    """Run the authors' released procedure through full logits.

    Args:
        case: model and batches.
        probes: where it probes; its hooks are removed afterwards.
        arithmetic: `"bf16 autocast"`, or else that of the parameters.
        rho: size of the perturbation.
        before_task: called before every task pass.
    """

    def task() -> Tensor:
        before_task()
        return naive_task_loss(case.model, case.batch)

    pairs = case.model, case.chosen, case.rejected
    published_step(
        case.model,
        case.trained,
        probes,
        backward(task, arithmetic),
        backward(partial(full_logits.contrastive_loss, *pairs), arithmetic),
        rho=rho,
    )
    probes.detach()


def compare(found: Sequence[Estimate], oracle: Estimate) -> dict[str, Any]:
    """Cosine and size of estimates relative to the oracle, in the mean, as fields of `Row`."""

    def norm(estimate: Estimate) -> float:
        return float(torch.cat([h.double() for h in estimate.values()]).norm())

    def mean(values: Iterable[float]) -> float:
        return sum(values) / len(found)

    return {
        "cosine": mean(cosine(h, oracle) for h in found),
        "relative_size": mean(norm(h) / norm(oracle) for h in found),
        "lowest_layer_cosine": mean(
            min(cosine({j: h[j]}, {j: oracle[j]}) for j in oracle) for h in found
        ),
        "repeats": len(found),
    }


def changed_share(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Share of the elements that differ."""
    pairs = list(zip(before, after, strict=True))
    return sum(int((a != b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)


# ---- the models ----


class TooShortError(ValueError):
    """`length` leaves too few rows with an answer."""


def smollm2_subject(seed: int, length: int) -> Subject:
    """SmolLM2-135M-Instruct with LoRA (r=8, on q and v) after a few steps on Alpaca rows.

    Raises:
        AssetError: model or data could not be fetched.
        TooShortError: `length` leaves too few rows with an answer.
    """
    base, tokenizer = assets.smollm2()
    generator = random.Random(seed)

    def encode(prompt: str, answer: str, length: int | None, *, complete: bool = True) -> Any:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        return encode_chat(tokenizer, messages, length, complete=complete)

    wanted = TASK_ROWS * (1 + WARM_UP_STEPS)
    rows = assets.alpaca_rows()
    task_rows: list[Any] = []
    for row in generator.sample(rows, len(rows)):
        prompt = "\n\n".join(filter(None, (row["instruction"], row["input"])))
        encoded = encode(prompt, row["output"], length)
        if encoded["labels"]:  # else the prompt alone fills it
            task_rows.append(encoded)
        if len(task_rows) == wanted:
            break
    else:
        raise TooShortError(
            f"--length {length} leaves an answer in {len(task_rows)} of {len(rows)} Alpaca rows; "
            f"{wanted} are needed: give a larger one"
        )
    safety_rows: list[Any] = []
    requests = assets.harmful_requests()[:200]
    for index, request in enumerate(generator.sample(requests, SAFETY_PAIRS)):
        pair = build_safety_pair(request, index)
        safety_rows.append(
            {
                "chosen": encode(request, pair["chosen"], None),
                "rejected": encode(request, pair["rejected"], None, complete=False),
            }
        )
    data = Data(task_rows, safety_rows, padding_token_id(tokenizer))
    batches = [data.batch(task_rows[k : k + TASK_ROWS]) for k in range(0, wanted, TASK_ROWS)]
    model = add_lora(base, Lora(dropout=DROPOUT), seed)
    case = Problem(model.train(), batches[0], **data.pairs(safety_rows))
    adamw = torch.optim.AdamW(case.trained, lr=WARM_UP_LR)
    for batch in batches[1:]:
        adamw.zero_grad()
        task_loss(case.model, batch).backward()
        adamw.step()
    adamw.zero_grad()
    return Subject("SmolLM2-135M-Instruct, LoRA", case, seed)


# How to make the subjects of `--config`, from seed and length.
CONFIGS: dict[str, list[Callable[[int, int], Subject]]] = {
    "smollm2": [smollm2_subject],
    "tiny": [
        lambda seed, _: Subject("tiny Llama, LoRA", problem(dropout=DROPOUT, seed=seed), seed),
        lambda seed, _: Subject(
            "tiny Llama, full", problem(lora=False, dropout=DROPOUT, seed=seed), seed
        ),
    ],
}


# ---- results ----


def write_csv(rows: Sequence[Row], surroundings: dict[str, str], path: Path) -> Path:
    """Write all rows, or, interrupted, nothing."""
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("w", newline="", encoding="utf-8") as file:
        names = [field.name for field in dataclasses.fields(Row)]
        writer = csv.DictWriter(file, [*names, *surroundings], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            figures = {
                name: f"{value:.6g}" if isinstance(value, float) else value
                for name, value in vars(row).items()
            }
            writer.writerow(figures | surroundings)
    return unfinished.replace(path)


def print_tables(rows: Sequence[Row], console: Console) -> None:
    """Print the three tables."""
    configs = list(dict.fromkeys(row.config for row in rows))
    for config in configs:
        title = f"h against the fp64 oracle: {config} (different masks: mean of {REPEATS} draws)"
        table = _table(title)
        for name in ("path", "arithmetic", "masks"):
            table.add_column(name)
        for name in ("ρ", "agreement", "cosine", "lowest layer", "size"):
            table.add_column(name, justify="right")
        for row in rows:
            if row.table == "numerics" and row.config == config:
                shown = f"auto → {row.rho:.2g}" if row.rho_setting == "auto" else f"{row.rho:g}"
                table.add_row(
                    row.path,
                    row.arithmetic,
                    row.masks,
                    shown,
                    _decimals(row.agreement),
                    _decimals(row.cosine),
                    _decimals(row.lowest_layer_cosine),
                    _decimals(row.relative_size, 2) + "×",
                )
        console.print(table)

    table = _table("ρ: cosine with the oracle (and agreement with ρ/2), central, same masks")
    table.add_column("ρ", justify="right")
    grid = {(r.config, r.arithmetic, r.rho): r for r in rows if r.table == "grid"}
    columns = list(dict.fromkeys((config, arithmetic) for config, arithmetic, _ in grid))
    for config, arithmetic in columns:
        table.add_column(f"{config}\n{arithmetic}", justify="right")
    for rho in RHO_GRID:
        cells = [grid[(*column, rho)] for column in columns]
        table.add_row(
            f"{rho:.2g}", *(f"{_decimals(c.cosine)} ({_decimals(c.agreement)})" for c in cells)
        )
    console.print(table)

    table = _table("Parameter elements that the probe passes leave changed")
    for name in ("path", "dtype", "ρ"):
        table.add_column(name)
    restore = [row for row in rows if row.table == "restore"]
    shares = {(r.config, r.path, r.dtype, r.rho): r.changed_elements for r in restore}
    for config in configs:
        table.add_column(config, justify="right")
    for path, dtype, rho in sorted({key[1:] for key in shares}):
        changed = [shares[config, path, dtype, rho] for config in configs]
        table.add_row(path, dtype, f"{rho:g}", *(f"{share:.2%}" for share in changed))
    console.print(table)


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold")


def _decimals(value: float | None, decimals: int = 4) -> str:
    return "–" if value is None else f"{value:.{decimals}f}"


def shortfalls(rows: Sequence[Row]) -> list[str]:
    """What FusedSAP's default misses of the cosines required, in words."""
    return [
        f"{row.config}, {row.path}, {row.arithmetic}: cosine {row.cosine:.4f}, "
        f"{REQUIRED[row.arithmetic]} required"
        for row in rows
        if row.table == "numerics" and row.path == "FusedSAP, central"
        # Also true of a cosine that is not a number.
        if not (row.cosine is not None and row.cosine >= REQUIRED[row.arithmetic])
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write CSV and picture, print the tables.

    Args:
        arguments: of the command line, without the program's name; `sys.argv` by default.

    Returns:
        0; 1 if FusedSAP's h misses a required cosine; 2 if the model could not be had.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fidelity",
        description=(
            "Measure the probe gradient h of FusedSAP, and of the authors' released procedure, "
            "against fp64 double backward. Prints three tables and writes fidelity.csv and "
            "fidelity.png. Takes about 5 minutes on 2 idle cores and 7 GB of memory; --config tiny "
            "takes seconds. The exit status is 1 where FusedSAP misses a cosine of "
            f"{REQUIRED['fp32']} in fp32 or {REQUIRED['bf16 autocast']} under bf16 autocast."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--config",
        choices=("smollm2", "tiny", "all"),
        default="all",
        help="SmolLM2-135M-Instruct with LoRA, a tiny random Llama with LoRA and in full, or both",
    )
    parser.add_argument(
        "--output", type=Path, default=RESULTS, help="folder that CSV and picture go to"
    )
    parser.add_argument(
        "--length", type=int, default=96, help="tokens kept of each task row of SmolLM2"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of rows, initial weights and dropout masks"
    )
    options = parser.parse_args(arguments)
    if options.length < 1:
        parser.error(f"--length {options.length}; expected at least 1")
    options.output.mkdir(parents=True, exist_ok=True)

    names = tuple(CONFIGS) if options.config == "all" else (options.config,)
    rows: list[Row] = []
    with Progress(console=Console(stderr=True)) as progress:
        for make_subject in (make for name in names for make in CONFIGS[name]):
            bar = progress.add_task("model, data and fp64 oracle", total=None)
            try:
                subject = make_subject(options.seed, options.length)
            except TooShortError as error:
                parser.error(str(error))
            except assets.AssetError as error:
                print(error, file=sys.stderr)
                return 2
            todo = subject.measurements()
            progress.update(bar, total=len(todo))
            for name, measure in todo:
                progress.update(bar, description=f"{subject.name}: {name}")
                rows += measure()
                progress.advance(bar)
            progress.update(bar, description=subject.name)
    # Written to a file, the tables would else be folded to 80 columns.
    print_tables(rows, Console(width=None if sys.stdout.isatty() else 150))
    # The oracle runs on the CPU, and so does everything that is held against it.
    surroundings = {**provenance(), "device": processor_name()}
    surroundings |= {"seed": str(options.seed), "length": str(options.length)}
    path = write_csv(rows, surroundings, options.output / "fidelity.csv")
    print(f"Wrote {path} and {pictures.draw(path)}")
    missed = shortfalls(rows)
    for line in missed:
        print(f"FusedSAP's h is not what it should be: {line}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
