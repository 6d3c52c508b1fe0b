"""The settings of a fine-tuning run: one dataclass that is also the commands' options and help."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, cast, get_type_hints

import typer

from sap_fast.cli.console import UserError
from sap_fast.data import AnswerScoring
from sap_fast.model.layers import LAYER_RANGES

_DATA, _MODEL, _TRAINING, _RUN = "Data", "Model", "Training", "Run"
_LOOKS = "Looks on the way"
_SAFETY, _PROBE = "Safety direction (blend and sap)", "Probe (sap)"

#: γ of `--optimizer blend`, with the level held: the study's choice (docs/study.md).
BLENDING_WEIGHT = 0.3

#: How bitsandbytes may store the weights of a frozen base.
LOAD_IN = ("4bit", "8bit")

#: Where the figures of steps can go, and the packages of which one has to be there.
REPORTERS = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
}

#: The largest seed that transformers takes; no count needs more either.
_LARGEST = 2**32 - 1

#: Options that earlier versions had, and what took their place.
GONE = {
    "--preset": "give --direction-every 5 --probe-rows 0.5 for what was balanced, and "
    "--direction-every 10 --probe-rows 0.25 for economical; paper is the default",
    "--probe-every": "--probe-rows makes the probe passes cheaper at every step, --direction-every "
    "the safety pass",
    "--probe-fraction": "it is called --probe-rows",
    "--probe-lr": "it is called --probe-size",
    "--schedule": "every step finds its own probe, as with --schedule paper; --probe-rows and "
    "--direction-every save time",
}

TRUST_HELP = (
    "Run Python code that comes with the model. It can do on this machine whatever you can: only "
    "for a source that you trust."
)


#: What of the answers of task rows is scored (`sap_fast.data.AnswerScoring`).
SCORED = ("auto", "template", "turns")
SCORED_HELP = (
    "Tokens of task rows that are scored. turns: every answer of the assistant, through its end of "
    "turn; template: of these what the chat template marks by {% generation %}; auto: as the "
    "template marks them, or turns where it has no marks. inspect shows them."
)
REASONING = ("train", "mask")
REASONING_HELP = (
    "Thoughts in the answers of task rows, in reasoning_content or between <think> and </think>. "
    "train: scored like the rest; mask: read, not scored."
)


@dataclass(frozen=True)
class Accepted:
    """The values that an option takes; None, for one that was left out, is always among them.

    Attributes:
        choices: All of them, where they are words.
        least: The smallest number; or
        above: what every number is greater than.
        most: The largest number.
    """

    choices: tuple[str, ...] = ()
    least: float | None = None
    above: float | None = None
    most: float = _LARGEST

    def check(self, name: str, value: Any) -> None:
        """Checks the value of a setting.

        Raises:
            UserError: It is not among them.
        """
        if value is None:
            return
        if self.choices and value not in self.choices:
            raise UserError(f"{flag(name)} {value}: expected {' or '.join(self.choices)}")
        wanted = []
        # Written so that NaN is outside.
        if self.least is not None and not value >= self.least:
            wanted.append(f"≥ {self.least}")
        if self.above is not None and not value > self.above:
            wanted.append(f"> {self.above}")
        if (self.least is not None or self.above is not None) and not value <= self.most:
            wanted.append(f"≤ {self.most}")
        if wanted:
            raise UserError(f"{flag(name)} {value}: expected a number {' and '.join(wanted)}")


def _option(default: Any, panel: str, text: str, **accepted: Any) -> Any:
    """Returns a dataclass field that `with_settings` turns into a command line option."""
    accepts = Accepted(**accepted)
    if not all(f"{choice}:" in text for choice in accepts.choices):
        text += f" One of {', '.join(accepts.choices)}."
    metadata = {"panel": panel, "help": text, "accepts": accepts}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class FinetuneSettings:
    """Everything that decides the outcome of a run; saved beside its result as `run.json`."""

    model: str = _option("", _MODEL, "Folder or hub name of an instruct model, or a PEFT adapter.")
    task: str = _option(
        "",
        _DATA,
        "Task rows, .jsonl, .json, .csv or .parquet, or a dataset, org/name:split or folder:split: "
        "messages; or prompt and completion; or instruction, input, output. Several with commas "
        "between them and weights: a.jsonl,b.jsonl=0.5 takes half of b's rows.",
    )
    output: str = _option("", _RUN, "Folder to write; appears only when the run is complete.")
    safety: str | None = _option(
        None,
        _DATA,
        "Safety rows, like --task: prompt, chosen (the safe answer), rejected (the harmful one; an "
        "opening suffices with rejected_is_opening: true); builtin: made for this model, of the "
        "requests that come with sap-fast.",
    )
    optimizer: str = _option(
        "blend",
        _TRAINING,
        "blend: AdamW that also goes down the safety loss, by --safety-weight; sap: the paper's "
        "probe, at two to three times the cost; adamw: plain fine-tuning.",
        choices=("blend", "sap", "adamw"),
    )
    full: bool = _option(False, _MODEL, "Train every parameter instead of a LoRA adapter.")
    lora_r: int = _option(8, _MODEL, "Rank of the LoRA adapter.", least=1)
    lora_alpha: int = _option(16, _MODEL, "Scale of the LoRA adapter, over its rank.", least=1)
    lora_dropout: float = _option(
        0.1, _MODEL, "Dropout on the LoRA adapter's input.", least=0, most=1
    )
    lora_target: str = _option(
        "auto",
        _MODEL,
        "Layers to adapt, such as q_proj,v_proj; all-linear; auto: PEFT's choice.",
    )
    modules_to_save: str | None = _option(
        None,
        _MODEL,
        "Modules to train whole and to save beside the LoRA adapter, such as lm_head,embed_tokens. "
        "A head that shares its weights with the embeddings is trained with them: naming either "
        "names both.",
    )
    load_in: str | None = _option(
        None,
        _MODEL,
        "Quantize the frozen weights under the adapter with bitsandbytes, for less memory. 4bit: "
        "NF4 with double quantization; 8bit: LLM.int8. By default they are left as they are.",
        choices=LOAD_IN,
    )
    lora_variant: str = _option(
        "lora",
        _MODEL,
        "Kind of adapter. lora: the plain one; rslora: scaled by alpha/√r, for high ranks; dora: "
        "with a length for each output, at some cost in time.",
        choices=("lora", "rslora", "dora"),
    )
    attention: str | None = _option(
        None,
        _MODEL,
        "Implementation of attention: eager, sdpa, flash_attention_2 or flex_attention. By default "
        "transformers' choice for the model.",
        choices=("eager", "sdpa", "flash_attention_2", "flex_attention"),
    )
    compile: str | None = _option(
        None,
        _MODEL,
        "Compile every decoder layer by itself, with this backend of torch.compile. inductor: to "
        "machine code; aot_eager, eager: traced alone, to find faults. The head is still applied "
        "in chunks, and batches are packed.",
        choices=("inductor", "aot_eager", "eager"),
    )
    liger: bool = _option(
        False,
        _MODEL,
        "Use the kernels of liger-kernel for norms, MLPs and rotary embeddings, on GPUs. Its fused "
        "loss stays off: the losses apply the head in chunks themselves.",
    )
    trust_remote_code: bool = _option(False, _MODEL, TRUST_HELP)
    precision: str = _option(
        "auto",
        _TRAINING,
        "auto: bf16-mixed where the accelerator computes in bf16, else fp32; fp32: weights and "
        "computation; bf16-mixed: compute in bf16 on fp32 weights; bf16: weights in bf16 too.",
        choices=("auto", "fp32", "bf16-mixed", "bf16"),
    )
    epochs: float = _option(1.0, _TRAINING, "Passes over the task rows.", above=0)
    max_steps: int | None = _option(None, _TRAINING, "Optimizer steps, over --epochs.", least=1)
    batch_size: int = _option(4, _TRAINING, "Task rows per micro-batch.", least=1)
    accumulate: int = _option(1, _TRAINING, "Micro-batches per optimizer step.", least=1)
    tokens_per_step: int | None = _option(
        None,
        _TRAINING,
        "Scored tokens per optimizer step, about, of all processes together; the micro-batches of "
        "a step follow from it, in the place of --accumulate.",
        least=1,
    )
    learning_rate: float = _option(1e-4, _TRAINING, "Peak learning rate.", least=0)
    weight_decay: float = _option(0.01, _TRAINING, "Decoupled weight decay.", least=0)
    warmup_steps: int = _option(0, _TRAINING, "Steps until the peak learning rate.", least=0)
    lr_schedule: str = _option(
        "linear",
        _TRAINING,
        "Shape of the schedule after it.",
        # transformers' others need arguments of their own.
        choices=(
            *("linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt"),
            *("constant", "constant_with_warmup"),
        ),
    )
    max_grad_norm: float = _option(
        1.0, _TRAINING, "Clip gradients to this norm, before any blending; 0: do not.", least=0
    )
    max_length: int = _option(512, _DATA, "Tokens to keep of a row.", least=1)
    scored: str = _option("auto", _DATA, SCORED_HELP, choices=SCORED)
    reasoning: str = _option("train", _DATA, REASONING_HELP, choices=REASONING)
    checkpointing: str = _option(
        "none",
        _TRAINING,
        "Recompute activations in backward: less memory for more time. none: nothing; layers: "
        "every decoder layer; auto: as many layers as memory asks for (with adamw and blend, every "
        "one).",
        choices=("none", "layers", "auto"),
    )
    seed: int = _option(0, _RUN, "Seed of the order of rows, of dropout and of LoRA.", least=0)
    safety_batch_size: int = _option(4, _SAFETY, "Safety rows per safety pass.", least=1)
    safety_loss: str | None = _option(
        None,
        _SAFETY,
        "contrastive: −logσ of the log-probability margin; difference: the margin itself; refusal: "
        "−log-probability of the safe answer alone; joint: measured as contrastive, descended with "
        "refusal as well; kl: the divergence from the aligned model on the safe answer, with LoRA. "
        "By default joint with --optimizer blend that holds a level, else "
        "contrastive.",
        choices=("contrastive", "difference", "refusal", "joint", "kl"),
    )
    safety_weight: float | None = _option(
        None,
        _SAFETY,
        "γ: how much of the safety direction to blend into the gradient, relative to it. By "
        f"default {BLENDING_WEIGHT} with --optimizer blend, and 0 with sap, as in the paper.",
        least=0,
    )
    safety_level: str | None = _option(
        None,
        _SAFETY,
        "Blend and probe only while the safety loss is above this: a number; auto: where it was "
        "before the tuning; or always: at every step, with which blending ends in refusals of "
        "harmless requests. By default auto where there is blending, and always with sap alone.",
    )
    rule: str = _option(
        "blend",
        _SAFETY,
        "How much to blend in. blend: γ times the gradient's length; project: only what takes out "
        "the part of the gradient that goes up the safety loss, where it does; floor: only what "
        "the gradient lacks to go down the safety loss by γ times its length.",
        choices=("blend", "project", "floor"),
    )
    direction_every: int = _option(
        1,
        _SAFETY,
        "Steps between safety passes. In between the last direction is kept, in a byte per element "
        "of what is large.",
        least=1,
    )
    probe_layers: str = _option(
        "early",
        _PROBE,
        "Layers to probe: early (1 to 10 of 32), middle (the paper's 11 to 20), or indices: 4,5,6.",
    )
    probe_size: float = _option(
        3e-3,
        _PROBE,
        "β: the probe's size, relative to the hidden states, or with --probe-rule lean the part of "
        "the gradient's length that the probe makes it lean by; 0 makes SAP plain AdamW.",
        least=0,
    )
    probe_rule: str = _option(
        "normalized",
        _PROBE,
        "How the probe follows from its gradient: normalized: of that size; lean: as large as "
        "makes the gradient lean by that part of its length; gradient: as in the paper; adam: as "
        "in its authors' code.",
        choices=("normalized", "lean", "gradient", "adam"),
    )
    probe_rows: float = _option(
        1.0,
        _PROBE,
        "Part of the task rows that find the probe: with fewer, probe passes are cheaper.",
        above=0,
        most=1,
    )
    rho: str = _option(
        "auto",
        _PROBE,
        "Size of the weight perturbation that finds the probe, relative to the weights; auto "
        "calibrates it in the first step.",
    )
    difference: str = _option(
        "central",
        _PROBE,
        "central: perturb the weights to both sides; forward: to one side, without a second "
        "perturbation.",
        choices=("central", "forward"),
    )
    log_every: int = _option(10, _RUN, "Steps between rows of metrics.jsonl.", least=1)
    report_to: str = _option(
        "none",
        _RUN,
        "Also report the figures of the steps to tensorboard, wandb or trackio, several with "
        "commas between them; none: to metrics.jsonl alone.",
    )
    eval: str | None = _option(
        None,
        _LOOKS,
        "Task rows that are not trained on, like --task: their loss is measured before, during and "
        "after the training, with refusals of a few built-in requests.",
    )
    eval_every: int | None = _option(
        None,
        _LOOKS,
        "Steps between these looks. By default there is one before and one after the training.",
        least=1,
    )
    keep_best: str | None = _option(
        None,
        _LOOKS,
        "Write the model of the best look rather than the last one. loss: the lowest held-out "
        "loss; safety: the lowest among those at which the model refuses no less than before.",
        choices=("loss", "safety"),
    )
    early_stop: int | None = _option(
        None,
        _LOOKS,
        "Stop after this many looks in a row without a better one, by what --keep-best follows, or "
        "without it by the held-out loss. Needs --eval-every.",
        least=1,
    )
    save_every: int | None = _option(
        None,
        _RUN,
        "Steps between checkpoints, from which an interrupted run goes on.",
        least=1,
    )

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            item.metadata["accepts"].check(item.name, getattr(self, item.name))

    def arguments(self) -> list[str]:
        """Returns what differs from the defaults as arguments of `sap-fast finetune`."""
        arguments = []
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if value != item.default:
                arguments += [flag(item.name)] if value is True else [flag(item.name), str(value)]
        return arguments

    @property
    def blending_weight(self) -> float:
        """γ: what was given, or the optimizer's own."""
        if self.safety_weight is not None:
            return self.safety_weight
        return BLENDING_WEIGHT if self.optimizer == "blend" else 0.0

    @property
    def held_level(self) -> str:
        """The level of the safety loss: what was given, or the optimizer's own."""
        if self.safety_level is not None:
            return self.safety_level
        return "auto" if self.blending_weight != 0 else "always"

    @property
    def descended_loss(self) -> str:
        """The safety loss: what was given, or the optimizer's own."""
        if self.safety_loss is not None:
            return self.safety_loss
        blends_to_level = self.optimizer == "blend" and self.held_level != "always"
        return "joint" if blends_to_level else "contrastive"

    def sap_options(self) -> dict[str, Any]:
        """Returns the keyword arguments for the optimizer.

        Raises:
            UserError: The level is neither a word nor a number.
        """
        level = _number_or("safety_level", self.held_level, {"auto": "auto", "always": None})
        return {
            "weight_decay": self.weight_decay,
            "safety_weight": self.blending_weight,
            "safety_level": None if self.optimizer == "adamw" else level,
            "rule": self.rule,
            "direction_every": self.direction_every,
        }

    def probe(self) -> dict[str, Any]:
        """Returns the keyword arguments for `ProbeSet`.

        Raises:
            UserError: ρ or the layers are neither a word nor numbers.
        """
        return {
            "layers": self._layers(),
            "size": self.probe_size,
            "rule": self.probe_rule,
            "rho": _number_or("rho", self.rho, {"auto": "auto"}),
            "difference": self.difference,
            "rows": self.probe_rows,
            "checkpointing": self.checkpointing,
        }

    def lora_targets(self) -> list[str] | str | None:
        """Returns the layers to adapt: names, `"all-linear"`, or None for PEFT's choice."""
        if self.lora_target == "all-linear":
            return self.lora_target
        return None if self.lora_target == "auto" else self.lora_target.split(",")

    def scoring(self) -> AnswerScoring:
        """Returns what of the answers of task rows is scored."""
        return answer_scoring(self.scored, self.reasoning)

    def saved_modules(self) -> list[str]:
        """Returns the names of the modules that are trained whole beside the adapter."""
        return [] if self.modules_to_save is None else self.modules_to_save.split(",")

    def reporters(self) -> list[str]:
        """Returns where to report to besides `metrics.jsonl`.

        Raises:
            UserError: It is unknown, or its package is not installed.
        """
        if self.report_to == "none":
            return []
        names = self.report_to.split(",")
        for name in names:
            if name not in REPORTERS:
                known = ", ".join(REPORTERS)
                raise UserError(f"--report-to {self.report_to}: expected none, or of {known}")
            if all(find_spec(package) is None for package in REPORTERS[name]):
                raise UserError(
                    f"--report-to {name}: its package is not installed: pip install {name}"
                )
        return names

    def _layers(self) -> str | list[int]:
        if self.probe_layers in LAYER_RANGES:
            return self.probe_layers
        try:
            return [int(index) for index in self.probe_layers.split(",")]
        except ValueError:
            raise UserError(
                f"--probe-layers {self.probe_layers}: expected {', '.join(LAYER_RANGES)}, or layer "
                "indices such as 4,5,6"
            ) from None


def _number_or(name: str, value: str, words: dict[str, str | None]) -> float | str | None:
    """Returns the number that an option was given, or what the word means that it was given."""
    if value in words:
        return words[value]
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{flag(name)} {value}: expected {', '.join(words)} or a number")
    return number


def answer_scoring(scored: str, reasoning: str) -> AnswerScoring:
    """Returns what the options of these names ask for.

    Raises:
        UserError: One of them is none of its choices.
    """
    Accepted(SCORED).check("scored", scored)
    Accepted(REASONING).check("reasoning", reasoning)
    return AnswerScoring(cast(Any, scored), cast(Any, reasoning))


def declare(command: Any, parameters: list[inspect.Parameter]) -> None:
    """Has typer read these parameters as those of a command."""
    # It reads both.
    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {p.name: p.annotation for p in parameters}


def refuse_gone_options(arguments: Iterable[str]) -> None:
    """Checks a command line for options that there once were.

    Raises:
        UserError: One is given; it says what took its place.
    """
    for argument in arguments:
        option = argument.partition("=")[0]
        if option in GONE:
            raise UserError(f"{option} is gone: {GONE[option]}")


#: Options that take several values in one word.
_LISTS = {
    "--task": "a.jsonl,b.jsonl",
    "--lora-target": "q_proj,v_proj",
    "--modules-to-save": "lm_head,embed_tokens",
    "--probe-layers": "4,5,6",
}


def refuse_repetition(options: Iterable[str]) -> None:
    """Checks that no option is given twice.

    Raises:
        UserError: One is.
    """
    given: set[str] = set()
    for option in options:
        if option in given:
            several = f", several values as in {_LISTS[option]}" if option in _LISTS else ""
            raise UserError(f"{option} is given twice: expected it once{several}")
        given.add(option)


def flag(name: str) -> str:
    """Returns the command line's name of a setting."""
    return "--" + name.replace("_", "-")


def with_settings(
    only: Collection[str] | None = None, *, without: Collection[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command settings as options, collected in its first parameter, `settings`.

    The command's own parameters follow after `settings: FinetuneSettings`.

    Args:
        only: Names of the settings; None for every one.
        without: Names of settings to leave out.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(FinetuneSettings)
        fields = [
            item
            for item in dataclasses.fields(FinetuneSettings)
            if (only is None or item.name in only) and item.name not in without
        ]
        parameters = []
        for item in fields:
            option = typer.Option(
                ... if item.default == "" else item.default,
                # A switch that a config turns on can be turned off on the command line.
                f"{flag(item.name)}/--no-{flag(item.name)[2:]}"
                if hints[item.name] is bool
                else flag(item.name),
                help=item.metadata["help"],
                rich_help_panel=item.metadata["panel"],
            )
            kind = inspect.Parameter.KEYWORD_ONLY
            parameters.append(
                inspect.Parameter(item.name, kind, default=option, annotation=hints[item.name])
            )
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]

        @functools.wraps(command)
        def run(**options: Any) -> None:
            given = {item.name: options.pop(item.name) for item in fields}
            command(FinetuneSettings(**given), **options)

        own = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
        declare(run, [*parameters, *own])
        return run

    return decorate
