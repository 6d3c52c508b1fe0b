"""Every method of the study with the settings that are tried, as one table.

The words of a setting are those of the rows in `results.csv`, whose keys are hashes of them; they
stay what they were where the package has found better ones. `options_of` translates.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from sap_fast import SAPTrainer
from sap_fast.baselines import (
    AsFTTrainer,
    AveragingTrainer,
    ConstrainedTrainer,
    ControlTrainer,
    EMATrainer,
    LisaTrainer,
    MixedTrainer,
    PanaceaTrainer,
    PublishedSAPTrainer,
    SAMTrainer,
    derta_loss,
)

Setting = dict[str, Any]

TASKS = ("alpaca", "poisoned", "gsm8k")
#: Run where they are asked for, with the settings that were chosen on the others.
MORE_TASKS = ("sentiment", "poisoned-5", "poisoned-30")
SEEDS = (0, 1, 2)
#: Tasks and seed on which the settings of a method are compared, on the selection split.
SELECTION = (("alpaca", 0), ("poisoned", 0), ("gsm8k", 0))

#: Of every fine-tuning; what a run is cached by. LoRA on q and v.
TRAINING: Setting = {
    "steps": 40,
    "batch_size": 4,
    "learning_rate": 1e-3,
    "lora_r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.1,
    "max_grad_norm": 1.0,
    "weight_decay": 0.01,
    "precision": "fp32",
    "safety_batch_size": 4,
    "safety_pairs": 140,
}


@dataclass(frozen=True)
class Model:
    """What is tuned.

    Attributes:
        base: the model that is aligned first: SmolLM2-135M-Instruct or Gemma-3-270M.
        training: what replaces `TRAINING`; every weight is tuned where `lora_r` is None.
    """

    base: Literal["smollm2", "gemma3"]
    training: Setting = field(default_factory=dict)

    @property
    def has_lora(self) -> bool:
        """Whether an adapter is tuned."""
        return (TRAINING | self.training)["lora_r"] is not None


#: By the name of the folder of its rows; those of the first lie in the study's own.
MODELS: dict[str, Model] = {
    "smollm2": Model("smollm2"),
    "gemma3": Model("gemma3"),
    "smollm2-full": Model(
        "smollm2",
        {"lora_r": None, "lora_alpha": None, "lora_dropout": None, "learning_rate": 3e-5},
    ),
}


# What a setting says nothing of is spelt out, as what a row means may not follow from defaults,
# which change with what the study finds.
#: Of every probe: the paper's layers.
PROBE: Setting = {"probe_layers": "middle", "probe_lr": 3e-3}
#: Of every optimizer.
OPTIMIZER: Setting = {"safety_weight": 0.0, "safety_level": None}
#: Of every safety pass.
SAFETY_LOSS = "contrastive"
#: `ProbeSet(layers="early")` of 30 layers.
EARLY = list(range(1, 10))


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Attributes:
        title: for tables and pictures.
        trainer: of `sap_fast`; None for a model that is not trained.
        settings: what is tried; see `options_of`.
        has_probe: whether `SAPTrainer` is to have a probe; it is `PROBE` with the setting over it.
        after: what is done with the tuned model, or before the tuning.
        needs_lora: whether it changes an adapter, which a model whose every weight is tuned lacks.
        first: settings that the first study tried beside these. Its rows stay, in a folder of
            their own; the package has some of these settings no more.
    """

    title: str
    trainer: type[SAPTrainer] | None
    settings: tuple[Setting, ...] = ({},)
    has_probe: bool = False
    after: str | None = None
    needs_lora: bool = False
    first: tuple[Setting, ...] = ()


#: What the settings below leave out is `PROBE`'s. ρ is the package's: "auto".
_SAP: tuple[Setting, ...] = (
    {"probe_layers": EARLY},
    {"probe_layers": EARLY, "probe_lr": 4e-3},
    {"probe_layers": EARLY, "probe_lr": 2e-3},
    {"probe_layers": EARLY, "safety_loss": "joint"},
    {},
)

#: h of a part of the rows, its direction kept for steps, and whether V serves the other rows too.
_ROWS: tuple[Setting, ...] = tuple(
    {"probe_layers": EARLY} | part
    for part in (
        {"rows": 0.25},
        {"rows": 0.25, "direction_every": 10},
        {"rows": 0.5},
        {"rows": 0.25, "own_rows": True, "probe_lr": 6e-3},
        {"rows": 0.5, "direction_every": 5},
        {"direction_every": 5},
    )
)

#: A probe as large as makes the gradient lean by a part of its length, whatever it is found from.
_LEAN: tuple[Setting, ...] = tuple(
    {"probe_rule": "lean"} | size
    for size in (
        {"probe_layers": EARLY, "probe_lr": 0.2},
        {"probe_layers": EARLY, "probe_lr": 0.2, "rows": 0.25, "direction_every": 10},
        {"probe_layers": EARLY, "probe_lr": 0.1},
        {"probe_lr": 0.2},
        {"probe_layers": EARLY, "probe_lr": 0.2, "rows": 0.25, "own_rows": True},
        {"probe_layers": EARLY, "probe_lr": 0.4, "rows": 0.25, "direction_every": 10},
    )
)

#: Of the first study alone.
_FIRST_SAP: tuple[Setting, ...] = (
    {"probe_lr": 2e-3},
    {"probe_lr": 1e-3},
    {"preset": "balanced"},
    {"preset": "economical"},
    {"probe_rule": "adam", "probe_lr": 5e-2},
    {"probe_rule": "gradient", "probe_lr": 1.0},
    {"safety_loss": "difference"},
    {"probe_layers": list(range(20, 29))},
    {"probe_layers": list(range(30))},
    {"safety_pairs": 8},
    {"safety_batch_size": 16},
    {"probe_layers": EARLY, "probe_lr": 5e-3},
    {"probe_layers": EARLY, "preset": "balanced"},
    {"probe_layers": list(range(5))},
    {"probe_layers": EARLY, "probe_lr": 5e-3, "safety_level": "auto"},
    {"probe_layers": EARLY, "probe_lr": 1e-2, "safety_level": "auto"},
    {"schedule": "lagged"},  # V of the batch before; gone from the package
    {"probe_shape": "token"},  # a probe for each token; gone, too
)

#: γ-blending that holds the level, with the likelihood of refusals and the margin descended.
_HELD: Setting = {"safety_weight": 0.3, "safety_level": "auto", "safety_loss": "joint"}

_CONTROLS: tuple[Setting, ...] = ({}, {"probe_layers": EARLY}, {"probe_lr": 1e-2})

METHODS: dict[str, Method] = {
    "shipped": Method("As published", None),
    "aligned": Method("Aligned, not tuned", None),
    "adamw": Method("AdamW", SAPTrainer),
    "sap": Method("SAP", SAPTrainer, _SAP, has_probe=True, first=_FIRST_SAP),
    "sap-rows": Method("SAP of some rows", SAPTrainer, _ROWS, has_probe=True),
    "sap-lean": Method("SAP sized by its lean", SAPTrainer, _LEAN, has_probe=True),
    "blend": Method(
        "γ-blending",
        SAPTrainer,
        (
            _HELD,
            _HELD | {"safety_weight": 0.1},
            {"safety_weight": 0.3, "safety_level": "auto"},
        ),
        first=(
            {"safety_weight": 0.1, "safety_level": "auto"},
            {"safety_weight": 0.1},
            {"safety_weight": 0.03},
            {"safety_weight": 0.1, "direction_every": 5},
            {"safety_weight": 1.0, "safety_level": "auto"},
            {"safety_weight": 0.3, "safety_level": "auto", "safety_batch_size": 8},
            {"safety_weight": 0.3, "safety_level": "auto", "safety_loss": "refusal"},
            {"safety_weight": 0.3, "safety_level": "auto", "varied_openings": True},
            {"safety_weight": 0.1, "safety_level": "auto", "varied_openings": True},
            {"safety_weight": 0.3, "safety_level": "auto", "aligned_share": 0.2},
            {"safety_weight": 0.3, "safety_level": "auto", "aligned_share": 0.1},
        ),
    ),
    # At most a tenth over AdamW's time.
    "blend-cheap": Method(
        "γ-blending, cheap",
        SAPTrainer,
        (
            _HELD | {"safety_weight": 0.1, "direction_every": 10},
            _HELD | {"direction_every": 10},
            _HELD | {"safety_batch_size": 1},
        ),
    ),
    "sap+blend": Method(
        "SAP and γ-blending",
        SAPTrainer,
        (
            _HELD | {"probe_layers": EARLY},
            _HELD | {"probe_layers": EARLY, "rows": 0.25, "direction_every": 10},
        ),
        has_probe=True,
        first=(
            {"safety_weight": 0.1},
            {"probe_layers": EARLY, "safety_weight": 0.3, "safety_level": "auto"},
        ),
    ),
    "mixed": Method(
        "Refusals in the data",
        MixedTrainer,
        tuple({"refusal_weight": weight} for weight in (0.1, 0.03, 0.5)),
    ),
    "random": Method("Random probe", ControlTrainer, _CONTROLS, has_probe=True),
    "flipped": Method("Flipped probe", ControlTrainer, _CONTROLS, has_probe=True),
    "along": Method("Lean of the probe alone", ControlTrainer, _CONTROLS[:2], has_probe=True),
    "beside": Method("Probe without its lean", ControlTrainer, _CONTROLS[:2], has_probe=True),
    "averaging": Method(
        "SAP, averaged over steps",
        AveragingTrainer,
        tuple({"averaged": what, "probe_layers": EARLY} for what in ("probe", "direction")),
        has_probe=True,
    ),
    "sam": Method("SAM", SAMTrainer, ({"radius": 0.05}, {"radius": 0.2})),
    "lisa": Method(
        "Lisa",
        LisaTrainer,
        (
            {"alignment_steps": 1, "task_steps": 9, "proximal": 0.1},
            {"alignment_steps": 1, "task_steps": 9, "proximal": 1.0},
            {"alignment_steps": 2, "task_steps": 8, "proximal": 0.1},
            {"alignment_steps": 1, "task_steps": 9, "proximal": 0.0},
            {"alignment_steps": 2, "task_steps": 8, "proximal": 0.0},
        ),
    ),
    "panacea": Method(
        "Panacea",
        PanaceaTrainer,
        ({"radius": 1.0, "harm_weight": 0.001}, {"radius": 0.3, "harm_weight": 0.1}),
    ),
    "merge": Method(
        "Merged with the aligned model",
        SAPTrainer,
        tuple({"aligned_share": share} for share in (0.3, 0.5, 0.7)),
        after="merge",
    ),
    "sppft": Method("Frozen safety layers", SAPTrainer, after="freeze"),
    "safegrad": Method(
        "SafeGrad",
        SAPTrainer,
        tuple(
            {"rule": "project", "safety_weight": 1.0, "safety_loss": loss}
            for loss in ("kl", "contrastive", "joint")
        ),
    ),
    "floor": Method(
        "γ as a floor",
        SAPTrainer,
        (
            {"rule": "floor", "safety_weight": 0.3, "safety_level": "auto", "safety_loss": "joint"},
            {"rule": "floor", "safety_weight": 0.1, "safety_level": "auto", "safety_loss": "joint"},
            {"rule": "floor", "safety_weight": 0.3, "safety_loss": "contrastive"},
            {"rule": "floor", "safety_weight": 0.1, "safety_loss": "kl"},
        ),
    ),
    "kl": Method(
        "KL to the aligned model",
        SAPTrainer,
        (
            {"safety_weight": 0.3, "safety_loss": "kl"},
            {"safety_weight": 0.1, "safety_loss": "kl"},
            {"safety_weight": 0.3, "safety_loss": "kl", "safety_level": "auto"},
            {"safety_weight": 1.0, "safety_loss": "kl"},
        ),
    ),
    "derta": Method(
        "DeRTa's loss",
        SAPTrainer,
        (
            {"safety_weight": 0.3, "safety_loss": "derta", "safety_level": "auto"},
            {"safety_weight": 0.1, "safety_loss": "derta", "safety_level": "auto"},
            {"safety_weight": 0.1, "safety_loss": "derta"},
        ),
    ),
    "constrained": Method(
        "Constrained SFT",
        ConstrainedTrainer,
        (
            {},
            {"strengths": [2.0, 8.0, 8.0, 8.0, 8.0]},
            {"strengths": [8.0] * 10},
            {"strengths": [2.0, 8.0, 8.0, 8.0, 8.0], "later_strength": 1.0},
        ),
    ),
    "ema": Method(
        "Average of weights, tuned rate",
        EMATrainer,
        (
            {"decay": 0.9},
            {"decay": 0.0, "learning_rate": 3e-4},
            {"decay": 0.9, "learning_rate": 3e-4},
            {"decay": 0.95},
            {"decay": 0.9, "batch_size": 8},
            {"decay": 0.95, "learning_rate": 3e-4, "batch_size": 8},
        ),
    ),
    "safelora": Method(
        "Safe LoRA",
        SAPTrainer,
        tuple({"threshold": threshold} for threshold in (0.35, 0.5, 0.7, 1.0)),
        after="project",
        needs_lora=True,
    ),
    "start": Method(
        "Aligned model's first tokens",
        SAPTrainer,
        tuple(
            {"start_tokens": tokens, "start_share": share}
            for tokens, share in ((2, 1.0), (5, 1.0), (2, 0.5), (5, 0.5), (1, 1.0))
        ),
        after="start",
    ),
    "asft": Method(
        "AsFT",
        AsFTTrainer,
        tuple({"penalty": weight} for weight in (1.0, 0.1, 10.0)),
        needs_lora=True,
    ),
    "interleaved": Method(
        "Safety rows interleaved",
        SAPTrainer,
        tuple({"share": share} for share in (0.1, 0.2, 0.05)),
    ),
    "published": Method("SAP as released", PublishedSAPTrainer),
}


#: Words of a setting that only say what is done with a tuned model.
AFTERWARDS = frozenset({"aligned_share", "threshold", "start_tokens", "start_share"})


@dataclass(frozen=True)
class Run:
    """One fine-tuning, and what its result is cached by."""

    method: str
    setting: str
    seed: int
    task: str
    model: str = "smollm2"

    @property
    def values(self) -> Setting:
        """The setting as a dict, with what it leaves to `PROBE`."""
        probe = PROBE if METHODS[self.method].has_probe else {}
        return probe | json.loads(self.setting)

    @property
    def training(self) -> Setting:
        """`TRAINING` with what the model and the setting replace in it."""
        replaced = {k: v for k, v in self.values.items() if k in TRAINING}
        return TRAINING | MODELS[self.model].training | replaced

    @property
    def has_lora(self) -> bool:
        """Whether an adapter is tuned."""
        return MODELS[self.model].has_lora

    @property
    def key(self) -> str:
        """What identifies the run in `results.csv`: a hash of all that decides its outcome.

        But for the model: every model has files of its own.
        """
        decides = {name: value for name, value in asdict(self).items() if name != "model"}
        content = json.dumps([decides, self.training], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:12]


#: Words of a setting: arguments of a trainer;
_OF_TRAINER = frozenset(
    {"safety_loss", "refusal_weight", "alignment_steps", "task_steps", "proximal", "radius"}
    | {"harm_weight", "averaged", "strengths", "later_strength", "decay", "penalty"}
)
#: of `ProbeSet`, and what they are called there;
_OF_PROBE = {
    "probe_layers": "layers",
    "probe_lr": "size",
    "probe_rule": "rule",
    "rows": "rows",
    "own_rows": "own_rows",
}
#: of the optimizer;
_OF_OPTIMIZER = frozenset({"safety_weight", "safety_level", "direction_every", "rule"})
#: of what is done before or after the tuning.
_AROUND = AFTERWARDS | {"varied_openings", "share"}


def options_of(run: Run) -> dict[str, Any]:
    """Return the keyword arguments of a run's trainer, beside those that all trainers have.

    Raises:
        ValueError: for a setting that the package has no more.
    """
    method, values = METHODS[run.method], run.values
    values = {word: value for word, value in values.items() if word not in _AROUND | set(TRAINING)}
    options = {word: values.pop(word) for word in _OF_TRAINER & set(values)}
    probe = {name: values.pop(word) for word, name in _OF_PROBE.items() if word in values}
    if run.model != "smollm2" and probe.get("layers") == EARLY:
        probe["layers"] = "early"
    optimizer = {word: values.pop(word) for word in _OF_OPTIMIZER & set(values)}
    if values:
        raise ValueError(f"{run.method} {run.setting}: {', '.join(values)} is no more to be had")
    if options.get("safety_loss") == "derta":
        options["safety_loss"] = derta_loss
    if method.trainer is ControlTrainer:
        options["control"] = run.method
    if method.has_probe:
        options["probe"] = probe
    elif method.trainer is SAPTrainer:
        options["method"] = "blend"
    else:
        return options  # such a trainer has an optimizer of its own
    return {"safety_loss": SAFETY_LOSS} | options | {"sap_options": OPTIMIZER | optimizer}


def run_of(method: str, setting: Setting, seed: int, task: str, model: str = "smollm2") -> Run:
    """Return a run."""
    return Run(method, json.dumps(setting, sort_keys=True), seed, task, model)


def selection_runs(methods: Iterable[str], model: str = "smollm2") -> Iterator[Run]:
    """Yield the runs among which the setting of each method is chosen.

    Every method with its first setting comes before any with its second.
    """
    chosen = list(methods)
    most = max((len(METHODS[name].settings) for name in chosen), default=0)
    for number in range(most):
        for task, seed in SELECTION:
            for name in chosen:
                if number < len(METHODS[name].settings):
                    yield run_of(name, METHODS[name].settings[number], seed, task, model)


def report_runs(
    settings: dict[str, Setting], tasks: Iterable[str] = TASKS, model: str = "smollm2"
) -> Iterator[Run]:
    """Yield the runs that are reported, given the setting of each method."""
    for seed in SEEDS:
        for task in tasks:
            for name, setting in settings.items():
                yield run_of(name, setting, seed, task, model)
