"""One run of the study: tune a model, ask it what a split asks, return a row."""

from __future__ import annotations

import copy
import functools
import json
import re
import statistics
import time
from pathlib import Path
from typing import Any, cast

import torch
from filelock import FileLock
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from torch import nn
from transformers import (
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import SaveStrategy

from benchmarks import assets
from benchmarks.alignment import aligned_gemma3, aligned_smollm2, write_rows
from benchmarks.provenance import ROOT
from benchmarks.study.data import Split, Task, load_task, requests_of, safety_pairs
from benchmarks.study.methods import (
    AFTERWARDS,
    METHODS,
    MODELS,
    Run,
    Setting,
    options_of,
    run_of,
)
from sap_fast import SAPTrainer, kl_loss
from sap_fast.baselines import (
    AlignedStart,
    AsFTTrainer,
    ConstrainedTrainer,
    find_safety_layers,
    freeze_layers,
    interleave,
    merge_with_aligned,
    project_onto_alignment,
)
from sap_fast.cli.finetune import peak_bytes
from sap_fast.cli.models import add_lora, load_model
from sap_fast.data import (
    SafetyCollator,
    TaskCollator,
    encode_prompt,
    load_safety_dataset,
    load_task_dataset,
    padding_token_id,
)
from sap_fast.evaluation import EvaluationResult, evaluate_model
from sap_fast.evaluation.batching import score_rows
from sap_fast.evaluation.progress import no_progress
from sap_fast.losses.aside import evaluation_mode

Row = dict[str, Any]

#: What was tuned, which other splits and methods start from, and encoded files.
WORK = ROOT / "runs" / "study"
FIGURES = "figures.json"
#: Few large batches: at this size of model, decoding costs by the batch.
EVALUATION_BATCH = 64
#: Steps between looks at the refusals of a model that is being tuned.
LOOK_EVERY = 20
#: Enough for the solutions of GSM8K, which have 100 tokens in the mean.
MAX_ANSWER_TOKENS = 200


def execute(run: Run, split: Split, threads: int, looked_at: bool = False) -> tuple[Row, list[Row]]:
    """Tune one model, unless its adapter is there already, and measure it on a split.

    Args:
        run: what to do.
        split: what to ask; half of the time of a run goes into this.
        threads: of the CPU.
        looked_at: ask the model on the way as well, where it is tuned for the selection split.

    Returns:
        The row of the split, and a row for every look during the tuning.
    """
    torch.set_num_threads(threads)
    started = time.perf_counter()
    task = load_task(run.task)
    model, tokenizer, figures, looks = tuned_model(run, looked_at and split == "selection")
    row = row_of(run, split, measure(task, split, model, tokenizer, run), figures)
    if task.has_answers:
        row["exact_answers"] = exact_answers(model, tokenizer, task.held_out[split])
    if task.choices:
        row["exact_answers"] = right_choices(model, tokenizer, task, split)
    seconds = time.perf_counter() - started
    return row | {"run_seconds": round(seconds, 1), "threads": threads}, looks


def tuned_model(run: Run, looked_at: bool = False) -> tuple[Any, Any, Row, list[Row]]:
    """Return the model that a run leaves, in fp32, tuned unless its adapter is there already.

    Args:
        run: what to do.
        looked_at: ask the model on the way, if it is tuned.

    Returns:
        The model, its adapter merged unless decoding needs the model without it; the tokenizer;
        the figures of the tuning; and a row for every look at it.
    """
    method, values = METHODS[run.method], run.values
    source = shipped(run.model) if run.method == "shipped" else aligned(run.model, run.seed)
    set_seed(run.seed)  # for the first values of the adapter
    model, tokenizer = load_model(str(source), "fp32", trainable=True)
    if method.trainer is None:
        return model, tokenizer, {}, []
    looks: list[Row] = []
    model = with_lora(model, run)
    if method.after == "freeze":
        freeze_layers(model, safety_layers(run, model, tokenizer))
    tuned_as = tuning_of(run)
    folder = folder_of(tuned_as)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Merges of one tuning with different shares may run at the same time.
    with FileLock(folder.with_suffix(".lock")):
        if folder.exists():
            model = with_weights_of(model, folder)
            figures = json.loads((folder / FIGURES).read_text())
        else:
            figures, looks = tune(tuned_as, load_task(run.task), model, tokenizer, looked_at)
            save(model, tokenizer, figures, folder)
    if "aligned_share" in values:
        start = None if run.has_lora else load_model(str(source), "fp32")[0].state_dict()
        merge_with_aligned(model, start, values["aligned_share"])
    if method.after == "project":
        project_onto_alignment(model, unaligned_weights(run.model), values["threshold"])
    if method.after == "start":
        beginner = None if run.has_lora else load_model(str(source), "fp32")[0]
        options = {"tokens": values["start_tokens"], "share": values["start_share"]}
        return AlignedStart(model, beginner, **options), tokenizer, figures, looks
    return merged(model), tokenizer, figures, looks


def with_weights_of(model: nn.Module, folder: Path) -> nn.Module:
    """Return the tuned model of a folder: `model` with the adapter there, or the model there."""
    if isinstance(model, PeftModel):
        set_peft_model_state_dict(model, load_peft_weights(str(folder)))
        return model
    return load_model(str(folder), "fp32", trainable=True)[0]


def with_lora(model: nn.Module, run: Run) -> Any:
    """Return the model with the adapter of a run, not trained yet, where the run has one."""
    if not run.has_lora:
        return model
    return add_lora(
        model,
        r=run.training["lora_r"],
        alpha=run.training["lora_alpha"],
        dropout=run.training["lora_dropout"],
        targets=None,
    )


def merged(model: nn.Module) -> Any:
    """Return a model without its adapter, as part of its weights: quicker to ask."""
    return cast(Any, model).merge_and_unload() if isinstance(model, PeftModel) else model


def shipped(model: str) -> Path:
    """Return the folder of a model as it was published."""
    is_smollm2 = MODELS[model].base == "smollm2"
    return assets.smollm2_folder() if is_smollm2 else assets.gemma3_folder()


def aligned(model: str, seed: int) -> Path:
    """Return the folder of an aligned model, after aligning it if it is not in the cache."""
    return aligned_smollm2(seed) if MODELS[model].base == "smollm2" else aligned_gemma3(seed)


def work_of(model: str) -> Path:
    """Return the folder for what the runs of a model leave."""
    return WORK if model == "smollm2" else WORK / model


def tuning_of(run: Run) -> Run:
    """Return the run whose tuning a run starts from: itself, or what it merges with the aligned.

    AdamW's where the method is what is done with the tuned model; for another method with an
    `aligned_share`, that without it.
    """
    setting = json.loads(run.setting)
    if not AFTERWARDS & set(setting):
        return run
    setting = {word: value for word, value in setting.items() if word not in AFTERWARDS}
    method = "adamw" if METHODS[run.method].after in ("merge", "project", "start") else run.method
    return run_of(method, setting, run.seed, run.task, run.model)


def folder_of(run: Run) -> Path:
    """Return the folder of what a run leaves: an adapter, or a model where all of it is tuned."""
    return work_of(run.model) / "adapters" / run.key


def tune(
    run: Run, task: Task, model: nn.Module, tokenizer: Any, looked_at: bool
) -> tuple[Row, list[Row]]:
    """Fine-tune `model` in place, and return the figures of it and the looks at it."""
    method, training, varied = METHODS[run.method], run.training, "varied_openings" in run.values
    assert method.trainer is not None
    pad = padding_token_id(tokenizer)
    arguments = TrainingArguments(
        output_dir=str(work_of(run.model) / "trainers" / run.key),
        max_steps=training["steps"],
        per_device_train_batch_size=training["batch_size"],
        learning_rate=training["learning_rate"],
        lr_scheduler_type="constant",
        weight_decay=training["weight_decay"],
        max_grad_norm=training["max_grad_norm"],
        logging_steps=5,
        bf16=training["precision"] == "bf16-mixed",
        use_cpu=not torch.accelerator.is_available(),
        save_strategy=SaveStrategy.NO,
        seed=run.seed,
        data_seed=run.seed,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    pairs = load_safety_dataset(
        write_rows(
            work_of(run.model) / "data" / f"pairs-{run.key}.jsonl",
            safety_pairs(training["safety_pairs"], varied),
        ),
        tokenizer,
        128,
    )
    rows = encoded(f"{run.task}-trained", task.trained, tokenizer, task.max_length)
    if "share" in run.values:
        rows = interleave(rows, [pair["chosen"] for pair in pairs], run.values["share"])
    options = options_of(run)
    if method.trainer is AsFTTrainer:
        options["unaligned"] = unaligned_weights(run.model)
    if not run.has_lora:
        options |= with_a_second_model(method.trainer, options, model)
    trainer = method.trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=TaskCollator(pad),
        safety_dataset=pairs,
        safety_collator=SafetyCollator(pad),
        safety_batch_size=training["safety_batch_size"],
        **options,
    )
    look = _Look(run, model, tokenizer, looked_at)
    trainer.add_callback(look)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    # That of the part, where the probe passes see no more.
    logged = [
        entry.get("sap/lean", entry.get("sap/lean_of_rows")) for entry in trainer.state.log_history
    ]
    leans = [lean for lean in logged if lean is not None]
    figures = {
        "lean_predicted": statistics.fmean(leans) if leans else None,
        "step_seconds": round(seconds_of_a_step(look.seconds, run.values), 4),
        "peak_bytes": look.peak_bytes,
    }
    return figures, look.rows


def seconds_of_a_step(seconds: list[float], values: Setting) -> float:
    """Return the median time of a step; of steps with and without a pass, the median of means.

    The first step also calibrates and warms up. Where the direction is taken every n steps, the
    means are over n steps in a row, from the third on, behind those that find the level.
    """
    every = values.get("direction_every", 1)
    counted = seconds[1:] if every == 1 else seconds[3:]
    periods = [counted[first : first + every] for first in range(0, len(counted), every)]
    whole = [each for each in periods if len(each) == every] or periods
    return statistics.median(map(statistics.fmean, whole))


def with_a_second_model(
    trainer: type[SAPTrainer], options: dict[str, Any], model: nn.Module
) -> dict[str, Any]:
    """Return what replaces options that need the aligned model: without LoRA that is a copy."""
    aligned = copy.deepcopy(model).requires_grad_(False).eval()
    if trainer is ConstrainedTrainer:
        return {"aligned": aligned}
    if options.get("safety_loss") == "kl":
        return {"safety_loss": functools.partial(kl_loss, aligned=aligned)}
    return {}


class _Look(TrainerCallback):
    """Times the steps, and asks the model half of the selection split every few of them."""

    def __init__(self, run: Run, model: nn.Module, tokenizer: Any, looked_at: bool) -> None:
        self._run, self._model, self._tokenizer = run, model, tokenizer
        self._looked_at = looked_at
        self._started = 0.0
        self._requests = requests_of("selection").harmful[::2]
        self.seconds: list[float] = []
        self.rows: list[Row] = []
        self.peak_bytes = 0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._started = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.seconds.append(time.perf_counter() - self._started)
        if not self.rows:
            self.peak_bytes = peak_bytes()  # an evaluation could raise it
        # What the end holds is measured with everything else.
        due = state.global_step % LOOK_EVERY == 0 and state.global_step < state.max_steps
        if self._looked_at and due:
            random_state = torch.get_rng_state()
            with torch.autocast("cpu", torch.bfloat16):
                result = evaluate_model(
                    self._model,
                    self._tokenizer,
                    harmful=self._requests,
                    batch_size=EVALUATION_BATCH,
                )
            torch.set_rng_state(random_state)
            assert result.refused_harmful is not None and result.margin is not None
            self.rows.append(
                described(self._run)
                | {
                    "step": state.global_step,
                    "refused_harmful": round(result.refused_harmful.mean, 4),
                    "margin": round(result.margin.mean, 3),
                }
            )


def measure(
    task: Task, split: Split, model: nn.Module, tokenizer: Any, run: Run
) -> EvaluationResult:
    """Return all measures of a model on a split."""
    requests = requests_of(split)
    rows = encoded(f"{run.task}-{split}", task.held_out[split], tokenizer, task.max_length)
    return evaluate_model(
        model,
        tokenizer,
        task_rows=rows,
        harmful=requests.harmful,
        harmless=requests.harmless,
        batch_size=EVALUATION_BATCH,
    )


def described(run: Run) -> Row:
    """Return the columns that say which run a row belongs to."""
    return {
        "key": run.key,
        "method": run.method,
        "setting": run.setting,
        "seed": run.seed,
        "task": run.task,
    }


def row_of(run: Run, split: Split, result: EvaluationResult, figures: Row) -> Row:
    """Return the row of a run for a split."""
    assert result.harmful_refused is not None and result.harmless_refused is not None
    assert result.harmful_margins is not None and result.task_loss is not None
    return (
        described(run)
        | {
            "split": split,
            "steps": run.training["steps"] if METHODS[run.method].trainer else 0,
            "refused_harmful": round(statistics.fmean(result.harmful_refused), 4),
            "refused_harmless": round(statistics.fmean(result.harmless_refused), 4),
            "margin": round(statistics.fmean(result.harmful_margins), 3),
            "task_loss": round(result.task_loss, 5),
            "exact_answers": None,
            "lean_predicted": None,
            "step_seconds": None,
            "peak_bytes": None,
        }
        | figures
        | {
            # One digit per request, for paired comparisons.
            "harmful_refusals": "".join(str(int(refused)) for refused in result.harmful_refused),
            "harmless_refusals": "".join(str(int(refused)) for refused in result.harmless_refused),
        }
    )


def unaligned_weights(model: str) -> dict[str, torch.Tensor]:
    """Return the weights of a model as published, which was then aligned."""
    return load_model(str(shipped(model)), "fp32", trainable=False)[0].state_dict()


def safety_layers(run: Run, model: nn.Module, tokenizer: Any) -> range:
    """Return the safety layers of a run's aligned model, found once and kept."""
    seed, path = run.seed, work_of(run.model) / f"safety-layers-{run.seed}.txt"
    if path.exists():
        first, last = path.read_text().split()
        return range(int(first), int(last) + 1)
    found = find_safety_layers(
        model,
        tokenizer,
        normal=[row["instruction"] for row in assets.alpaca_rows()[:100]],
        malicious=assets.harmful_requests()[:100],
        edgy=[request.prompt for request in requests_of("selection").harmless],
        batch_size=EVALUATION_BATCH,
        seed=seed,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{found.first} {found.last}")
    return found.layers


def encoded(name: str, rows: list[Row], tokenizer: Any, max_length: int) -> Any:
    """Return rows as `load_task_dataset` encodes them."""
    return load_task_dataset(
        write_rows(WORK / "data" / f"{name}-{time.time_ns()}.jsonl", rows), tokenizer, max_length
    )


def save(model: Any, tokenizer: Any, figures: Row, folder: Path) -> None:
    """Keep what was trained, a PEFT adapter or a model, and the figures of the tuning."""
    unfinished = folder.with_name(folder.name + ".unfinished")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    (unfinished / FIGURES).write_text(json.dumps(figures))
    unfinished.rename(folder)


def right_choices(model: nn.Module, tokenizer: Any, task: Task, split: Split) -> float:
    """Return the share of rows whose own answer is likelier than every other choice."""
    rows = task.held_out[split]
    scores = []
    for choice in task.choices:
        answered = encoded(
            f"choice-{choice}",
            [row | {"completion": choice} for row in rows],
            tokenizer,
            task.max_length,
        )
        scores.append(
            score_rows(
                model,
                list(answered),
                pad_token_id=padding_token_id(tokenizer),
                batch_size=EVALUATION_BATCH,
                progress=no_progress,
                description="",
            )
        )
    likeliest = torch.stack(scores).argmax(dim=0).tolist()
    right = sum(
        task.choices[found] == row["completion"] for found, row in zip(likeliest, rows, strict=True)
    )
    return right / len(rows)


_ANSWER = re.compile(r"####\s*(-?[\d,.]*\d)")


def exact_answers(model: Any, tokenizer: Any, problems: list[Row]) -> float:
    """Return the share of problems whose greedy solution ends in the right number."""
    right = 0
    prompts = [encode_prompt(tokenizer, problem["prompt"]) for problem in problems]
    pad = padding_token_id(tokenizer)
    batch = TaskCollator(pad, padding_side="left")(
        [{"input_ids": ids, "labels": ids} for ids in prompts]
    )
    with evaluation_mode(model), torch.no_grad():
        outputs = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=MAX_ANSWER_TOKENS,
            do_sample=False,
            pad_token_id=pad,
        )
    texts = tokenizer.batch_decode(
        outputs[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
    )
    for text, problem in zip(texts, problems, strict=True):
        given, wanted = _ANSWER.findall(text), _ANSWER.findall(problem["completion"])
        right += bool(given) and number(given[-1]) == number(wanted[-1])
    return right / len(problems)


def number(text: str) -> float:
    """Return the number that GSM8K writes as `1,234`."""
    return float(text.replace(",", ""))
