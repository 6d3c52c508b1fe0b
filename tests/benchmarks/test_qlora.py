"""Memory on a quantized base, counted beside the cost model; the page has the CSV's figures."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from benchmarks import contenders, cost_model, qlora, workloads
from benchmarks.contenders import TrainerRun
from benchmarks.cost_model import Job, Tokens
from benchmarks.measuring import memory_events, peak
from benchmarks.provenance import RESULTS, read_rows
from benchmarks.step import work_sizes
from benchmarks.workloads import SAFETY_PAIRS, Case, Lora, Shape
from sap_fast.integrations.safety_batches import SafetyBatches
from tests.quantized import NF4

#: Wide enough that constants of blocks, and padding of storages, are small.
SMALL = Shape("small", 256, 4, 4, 2, 512, 1024, tied=False)


def loaded(folder: Path) -> Any:
    workloads.random_llama(SMALL, dtype=torch.bfloat16).save_pretrained(folder)
    how = BitsAndBytesConfig(**NF4 | {"bnb_4bit_compute_dtype": torch.bfloat16})
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=how, dtype=torch.bfloat16
    )


def test_what_a_4_bit_model_takes_is_counted(tmp_path: Path) -> None:
    model = loaded(tmp_path)
    counted = 0
    for parameter in model.parameters():
        counted += parameter.untyped_storage().nbytes()
        if (state := getattr(parameter, "quant_state", None)) is not None:
            # Not the codes, 16 and 256 numbers, that all weights of a kind have alike.
            counted += state.absmax.untyped_storage().nbytes()
            counted += state.state2.absmax.untyped_storage().nbytes()
    job = Job(SMALL, Lora(), {}, dtype="bf16", base="4bit")
    assert job.loaded_bytes - 4 * job.trained == pytest.approx(counted, rel=1e-3)


def test_memory_of_a_counted_step_on_4_bit(tmp_path: Path) -> None:
    contenders.start_case()
    data = workloads.random_data(64, vocabulary=1024, rows=16)
    model = workloads.add_lora(loaded(tmp_path))
    run = TrainerRun("sap", model, data, bf16=True, checkpointing="layers")
    *first, last = workloads.batches(data, 4, 2)
    for rows in first:
        run.step(run.prepare(rows))
    run.sizes.steps.clear()
    counted = peak(memory_events(functools.partial(run.step, run.prepare(last))))
    sizes = work_sizes(Case("lora", "4x96", "bf16", "tiny"), "sap", run.sizes, [last])
    pairs = SafetyBatches(data.safety, SAFETY_PAIRS, contenders.SEED).rows(1)
    answers = [answer["labels"] for pair in pairs for answer in pair.values()]
    sizes["safety_scored"] = sum(label != -100 for labels in answers for label in labels)
    kinds: tuple[cost_model.Pass, ...] = ("safety", "probe", "task")
    batches = {
        kind: Tokens(*(sizes[f"{kind}_{what}"] for what in ("tokens", "squares", "scored")))
        for kind in kinds
    }
    job = Job(SMALL, Lora(), batches, checkpointing="layers", dtype="bf16", base="4bit")
    predicted = cost_model.step_memory(job)
    assert predicted == pytest.approx(run.kept_bytes() + counted, rel=0.15)


def test_the_page_has_the_figures_of_the_csv_and_the_csv_those_of_the_model() -> None:
    rows = qlora.table()
    stored = read_rows(RESULTS / "qlora.csv")
    assert [{name: row[name] for name in rows[0]} for row in stored] == [
        {name: str(value) for name, value in row.items()} for row in rows
    ]
    page = qlora.PAGE.read_text(encoding="utf-8")
    assert page == qlora.written(page, qlora.tables(rows))


def test_it_writes_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    names = ("passes", "bases")
    page.write_text("".join(qlora.BEGIN.format(name) + "old\n" + qlora.END for name in names))
    assert qlora.main(["--results", str(tmp_path), "--page", str(page)]) == 0
    assert "old" not in page.read_text() and "| SAP | layers |" in page.read_text()
    rows = read_rows(tmp_path / "qlora.csv")
    by_base = {row["base"]: float(row["peak_gb"]) for row in rows if row["fits"] == "yes"}
    assert by_base["4 bit"] < by_base["8 bit"] < by_base["bf16"]
    assert all(row["kind"] == "predicted" for row in rows)
