"""One fine-tuning run, from files to a model that `from_pretrained` loads.

A run works in `OUTPUT.unfinished` and is renamed to `OUTPUT` when it is complete, so that a folder
of the given name is never half a result. Started again after an interruption, it goes on from its
last checkpoint. On several ranks the first one alone writes (`sap_fast.cli.ranks`).
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from sap_fast.cli import ranks, sharding
from sap_fast.cli.console import Bar, UserError, console, progress_bar
from sap_fast.cli.environment import environment
from sap_fast.cli.faster import apply_liger, compile_layers
from sap_fast.cli.looks import Looks, move_best, requests_to_look_at
from sap_fast.cli.models import (
    WEIGHT_DTYPES,
    add_lora,
    load_model,
    refuse_without_marks,
    resolved_precision,
)
from sap_fast.cli.pairs import ask_for_pairs
from sap_fast.cli.settings import FinetuneSettings, flag
from sap_fast.cli.unfinished import refuse_other_settings, removed_on_failure
from sap_fast.compatibility import checkpointing_arguments, log_into, max_memory_allocated
from sap_fast.data import (
    BUILTIN,
    SafetyCollator,
    TaskCollator,
    load_safety_dataset,
    load_task_dataset,
    load_task_sources,
    padding_token_id,
)
from sap_fast.integrations.checkpoints import last_complete_checkpoint
from sap_fast.integrations.token_steps import TokenStepsMixin
from sap_fast.integrations.trainer import SAPTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainerControl, TrainerState


def finetune(settings: FinetuneSettings) -> Path:
    """Runs or resumes a fine-tuning.

    Args:
        settings: what to do.

    Returns:
        The folder with the adapter or model, its tokenizer, `metrics.jsonl` (a row per logged
        step) and `run.json` (settings, versions, median step time, peak memory).

    Raises:
        UserError: for settings that do not go together or an output folder that is in the way.
        DataError: for a row that cannot be used.
        OSError: for an output folder that cannot be written.
    """
    output = Path(settings.output)
    sharding.refuse_what_is_not_supported(settings)
    with ranks.joined():
        _finetune(settings, output)
    return output


def _finetune(settings: FinetuneSettings, output: Path) -> None:
    work, checkpoint = ranks.on_first(lambda: _resume(settings, output))
    with removed_on_failure(work, keep=lambda: any(work.glob("checkpoints/checkpoint-*"))):
        ranks.on_first(lambda: work.mkdir(parents=True, exist_ok=True))
        trainer, tokenizer = prepare(settings, work)
        _train(settings, work, trainer, tokenizer, checkpoint)
        ranks.on_first(lambda: work.rename(output))


def prepare(settings: FinetuneSettings, work: Path) -> tuple[Trainer, PreTrainedTokenizerBase]:
    """Does all of a run that comes before its first step, and with it all checks of what was given.

    Args:
        settings: of the run; its output is not looked at.
        work: folder of the run.

    Returns:
        The trainer with its optimizer, and the tokenizer.

    Raises:
        UserError: for settings that do not go together or do not fit the model.
        DataError: for a row that cannot be used.
    """
    if settings.optimizer != "adamw" and settings.safety is None:
        raise UserError(
            f"--safety is missing: --optimizer {settings.optimizer} needs preference rows; "
            f"--safety {BUILTIN} makes them of the requests that come with sap-fast"
        )
    if settings.optimizer == "blend" and settings.blending_weight == 0:
        raise UserError("--safety-weight 0: --optimizer blend needs a number > 0, such as 0.3")
    if settings.optimizer == "sap" and settings.rule != "blend" and settings.blending_weight == 0:
        raise UserError(
            f"--rule {settings.rule}: --optimizer sap blends nothing in; give a --safety-weight "
            "> 0 too, such as 0.3"
        )
    if settings.tokens_per_step is not None and settings.accumulate != 1:
        raise UserError(
            f"--accumulate {settings.accumulate}: how many micro-batches a step has follows from "
            f"--tokens-per-step {settings.tokens_per_step}; leave one of them out"
        )
    if settings.compile and settings.optimizer == "sap" and settings.checkpointing != "none":
        raise UserError(
            f"--checkpointing {settings.checkpointing}: with --optimizer sap it changes pass by "
            f"pass, which the layers of --compile {settings.compile} cannot; leave out one"
        )
    for name in ("eval_every", "keep_best", "early_stop"):
        if settings.eval is None and getattr(settings, name) is not None:
            raise UserError(f"{flag(name)} needs --eval: task rows to look at")
    if settings.early_stop is not None and settings.eval_every is None:
        raise UserError(
            f"--early-stop {settings.early_stop}: needs --eval-every: how often to look"
        )
    settings.reporters()

    def load() -> tuple[torch.nn.Module, PreTrainedTokenizerBase, list[Any]]:
        set_seed(settings.seed)  # for the first values of the adapter
        model, tokenizer = load_trained_model(settings)
        refuse_without_marks(settings.scored, settings.model, tokenizer)
        task_rows = load_task_sources(
            settings.task,
            tokenizer,
            settings.max_length,
            seed=settings.seed,
            scoring=settings.scoring(),
        )
        if settings.eval is not None:
            held_out_rows(settings, tokenizer)
        return model, tokenizer, task_rows

    def build() -> Trainer:
        safety_rows = None
        if safety is not None:
            safety_rows = load_safety_dataset(safety, tokenizer, settings.max_length)
        try:
            with _tensorboard_in(work / "tensorboard"):
                trainer = _trainer(settings, work, model, tokenizer, task_rows, safety_rows)
            log_into(trainer.args, work / "tensorboard")
            trainer.create_optimizer()
        except ValueError as error:
            raise UserError(str(error)) from error
        return trainer

    # Where one rank fails, none may wait for it: one after the other, each on all ranks.
    model, tokenizer, task_rows = ranks.on_every(load)
    safety = None if settings.optimizer == "adamw" else settings.safety
    if safety == BUILTIN:
        pairs = work / "safety-pairs.jsonl"
        looked_at = requests_to_look_at() if settings.eval else []
        ranks.on_first(lambda: ask_for_pairs(pairs, model, tokenizer, without=looked_at))
        safety = str(pairs)
    return ranks.on_every(build), tokenizer


def held_out_rows(settings: FinetuneSettings, tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """Returns the rows of `--eval`, encoded."""
    assert settings.eval is not None
    return load_task_dataset(
        settings.eval, tokenizer, settings.max_length, scoring=settings.scoring()
    )


@contextmanager
def _tensorboard_in(folder: Path) -> Iterator[None]:
    """Lets transformers put TensorBoard's files there, unless the user has said where."""
    name = "TENSORBOARD_LOGGING_DIR"
    if name in os.environ:
        yield
        return
    os.environ[name] = str(folder)
    try:
        yield
    finally:
        del os.environ[name]


def _train(
    settings: FinetuneSettings,
    work: Path,
    trainer: Trainer,
    tokenizer: PreTrainedTokenizerBase,
    checkpoint: str | None,
) -> None:
    """Trains, and saves into `work` what the finished folder is to hold."""

    def begin() -> list[dict[str, Any]]:
        (work / "run.json").write_text(_run_record(settings), encoding="utf-8")
        kept = _cut_metrics(work / "metrics.jsonl", checkpoint)
        # It is there even if the run is too short for a row.
        (work / "metrics.jsonl").touch()
        return kept

    kept = ranks.on_first(begin)
    looks = None
    if settings.eval is not None:
        looks = Looks(
            work,
            trainer,
            tokenizer,
            held_out_rows(settings, tokenizer),
            every=settings.eval_every,
            keep=settings.keep_best,
            patience=settings.early_stop,
            kept=kept,
        )
    with progress_bar(f"Fine-tuning ({settings.optimizer})") as bar:
        recorder = _Recorder(work / "metrics.jsonl", bar, kept)
        trainer.add_callback(recorder)
        if looks is not None:
            trainer.add_callback(looks)
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=checkpoint)

    whole = sharding.whole_state(trainer)

    def save() -> None:
        figures = recorder.figures()
        if looks is not None and looks.why_stopped is not None:
            console.print(looks.why_stopped)
            figures["stopped_step"] = trainer.state.global_step
            figures["why_stopped"] = looks.why_stopped
        if looks is not None and settings.keep_best is not None:
            assert looks.best is not None
            move_best(work)
            figures["kept_step"] = looks.best["step"]
        else:
            trained: Any = trainer.accelerator.unwrap_model(trainer.model)
            trained.save_pretrained(work, **({} if whole is None else {"state_dict": whole}))
        tokenizer.save_pretrained(work)
        (work / "run.json").write_text(_run_record(settings, figures), encoding="utf-8")
        shutil.rmtree(work / "checkpoints", ignore_errors=True)

    ranks.on_first(save)


def load_trained_model(
    settings: FinetuneSettings,
) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """Loads the model with the parameters that `settings` train: all, or an adapter's.

    Raises:
        UserError: if the model cannot be loaded; if `full` is set and it is an adapter, or its
            weights are quantized; for modules to save that it does not have, or beside no new
            adapter; for a compiler or kernels that do not work here.
    """
    if settings.full and settings.load_in is not None:
        raise UserError(
            f"--load-in {settings.load_in}: quantized weights cannot be trained; leave --full out, "
            "to train an adapter on them"
        )
    model, tokenizer = load_model(
        settings.model,
        settings.precision,
        trainable=True,
        trust_remote_code=settings.trust_remote_code,
        load_in=settings.load_in,
        attention=settings.attention,
    )
    is_adapter = hasattr(model, "peft_config")
    if settings.full and getattr(model, "is_quantized", False):
        raise UserError(
            f"--full: the weights of {settings.model} are quantized and cannot be trained; leave "
            "--full out, to train an adapter on them"
        )
    if settings.full and is_adapter:
        raise UserError(
            f"--full: {settings.model} is an adapter, which is trained as it is; leave --full out, "
            "or merge the adapter into its model first"
        )
    if settings.modules_to_save is not None and (settings.full or is_adapter):
        why = (
            "--full trains every module"
            if settings.full
            else f"{settings.model} is an adapter, which is trained as it is"
        )
        raise UserError(f"--modules-to-save {settings.modules_to_save}: {why}; leave it out")
    if settings.liger:
        apply_liger(model)
    if not settings.full and not is_adapter:
        model = add_lora(
            model,
            r=settings.lora_r,
            alpha=settings.lora_alpha,
            dropout=settings.lora_dropout,
            targets=settings.lora_targets(),
            variant=settings.lora_variant,
            saved=settings.saved_modules(),
        )
    if settings.compile is not None:
        compile_layers(model, settings.compile)
    return model, tokenizer


def _resume(settings: FinetuneSettings, output: Path) -> tuple[Path, str | None]:
    """Returns the folder to work in, and the checkpoint in it that there is to go on from."""
    if output.exists():
        raise UserError(f"--output {output}: exists already; remove it or choose another folder")
    work = output.with_name(output.name + ".unfinished")
    record = work / "run.json"
    if not record.exists():
        shutil.rmtree(work, ignore_errors=True)
        return work, None
    refuse_other_settings(work, dataclasses.asdict(settings))
    begun_on = json.loads(record.read_text(encoding="utf-8")).get("ranks", 1)
    if begun_on != ranks.count():
        raise UserError(
            f"{work} was begun on {begun_on} rank(s), and these are {ranks.count()}: each step "
            "would have other rows; start as many to go on, or remove that folder to start over"
        )
    folder = work / "checkpoints"
    checkpoint = last_complete_checkpoint(folder)
    if checkpoint is not None:
        console.print(f"Going on from {Path(checkpoint).name} in {work}")
    return work, checkpoint


def _trainer(
    settings: FinetuneSettings,
    work: Path,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task_rows: list[Any],
    safety_rows: list[Any] | None,
) -> Trainer:
    probes = settings.optimizer == "sap"
    arguments = TrainingArguments(
        output_dir=str(work / "checkpoints"),
        num_train_epochs=settings.epochs,
        max_steps=-1 if settings.max_steps is None else settings.max_steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup_steps,
        lr_scheduler_type=settings.lr_schedule,
        max_grad_norm=settings.max_grad_norm,
        bf16=resolved_precision(settings.precision) == "bf16-mixed",
        # Without an accelerator it has to be said, or bf16 is refused.
        use_cpu=not torch.accelerator.is_available(),
        # With a probe, the probe set does it: pass by pass.
        **checkpointing_arguments(not probes and settings.checkpointing != "none"),
        seed=settings.seed,
        data_seed=settings.seed,
        optim="adamw_torch",
        logging_steps=settings.log_every,
        save_strategy="no" if settings.save_every is None else "steps",
        save_steps=settings.save_every or 500,
        save_total_limit=1,
        report_to=settings.reporters(),
        # What trackers call it; the folder of checkpoints is one that goes again.
        run_name=Path(settings.output).name,
        disable_tqdm=True,
        dataloader_pin_memory=torch.accelerator.is_available(),
        remove_unused_columns=False,
    )
    pad = padding_token_id(tokenizer)
    common: dict[str, Any] = {
        "model": model,
        "args": arguments,
        "train_dataset": task_rows,
        "data_collator": TaskCollator(pad),
        "processing_class": tokenizer,
    }
    by_tokens = settings.tokens_per_step is not None
    if by_tokens:
        common["tokens_per_step"] = settings.tokens_per_step
    if safety_rows is None:
        return _TokenTrainer(**common) if by_tokens else Trainer(**common)
    trainer = _SAPTokenTrainer if by_tokens else SAPTrainer
    return trainer(
        **common,
        safety_dataset=safety_rows,
        safety_collator=SafetyCollator(pad),
        safety_batch_size=settings.safety_batch_size,
        safety_loss=settings.descended_loss,
        method="sap" if probes else "blend",
        probe=settings.probe() if probes else None,
        sap_options=settings.sap_options(),
    )


class _TokenTrainer(TokenStepsMixin, Trainer):
    pass


class _SAPTokenTrainer(TokenStepsMixin, SAPTrainer):
    pass


def _cut_metrics(path: Path, checkpoint: str | None) -> list[dict[str, Any]]:
    """Drops the rows after the checkpoint, whose steps will run again; returns those before."""
    if not path.exists():
        return []
    last = int(checkpoint.rsplit("-", 1)[1]) if checkpoint else 0
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    kept = [row for row in rows if row["step"] <= last]
    path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    return kept


class _Recorder(TrainerCallback):
    """Moves the progress bar, times the steps and writes `metrics.jsonl`."""

    def __init__(self, path: Path, bar: Bar, kept: list[dict[str, Any]]) -> None:
        self._path, self._bar = path, bar
        self._seconds = [row["step_seconds"] for row in kept if "step_seconds" in row]
        self._started = 0.0
        self._last = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._bar.resize(state.max_steps)
        self._bar.advance(state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._started = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self._last = time.perf_counter() - self._started
        self._seconds.append(self._last)
        self._bar.advance()
        if state.global_step >= state.max_steps:
            # A run that goes on from a checkpoint takes a step first, and this was the last one.
            control.should_save = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if logs is None or "loss" not in logs or not state.is_world_process_zero:
            return
        row = {"step": state.global_step, "step_seconds": round(self._last, 4)} | logs
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self._bar.note(f"loss {logs['loss']:.3f}")

    def figures(self) -> dict[str, Any]:
        """Returns the median step time and the peak memory of this process."""
        # The first step of a run also calibrates, compiles or warms up.
        steps = self._seconds[1:] or self._seconds
        return {
            "step_seconds": statistics.median(steps) if steps else None,
            "peak_bytes": peak_bytes(),
        }


def peak_bytes() -> int:
    """Returns the peak memory of the accelerator, or else of this process, in bytes."""
    if torch.accelerator.is_available():
        return max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _run_record(settings: FinetuneSettings, figures: dict[str, Any] | None = None) -> str:
    record = {
        "settings": dataclasses.asdict(settings),
        "environment": environment(),
        "precision": resolved_precision(settings.precision),
        "weight_dtype": str(WEIGHT_DTYPES[resolved_precision(settings.precision)]),
        "ranks": ranks.count(),
        "figures": figures,
    }
    return json.dumps(record, indent=2) + "\n"
