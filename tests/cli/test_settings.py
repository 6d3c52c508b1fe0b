"""Settings: what they accept, what follows from them, and the arguments that make them."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from sap_fast import BlendedAdamW, FusedSAP, ProbeSet
from sap_fast.cli.settings import FinetuneSettings
from tests.cli.terminal import Terminal


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--optimizer", "sgd"], "--optimizer sgd: expected blend or sap or adamw"),
        (["--rho", "big"], "--rho big: expected auto or a number"),
        (["--safety-level", "low"], "--safety-level low: expected auto, always or a number"),
        (["--rho", "nan"], "--rho nan: expected auto or a number"),
        (["--probe-layers", "high"], "--probe-layers high: expected early, middle, or"),
        (["--probe-layers", "7"], "7 is out of range for a model of 3 layers"),
        (["--lora-target", "w_q"], "--lora-target w_q: does not fit the model"),
        (["--optimizer", "blend", "--safety-weight", "0"], "--safety-weight 0"),
        (["--rule", "project"], "--rule project: --optimizer sap blends nothing in"),
        (["--rule", "harsh"], "--rule harsh: expected blend or project or floor"),
        (["--difference", "none"], "--difference none: expected central or forward"),
        (["--lr-schedule", "steep"], "--lr-schedule steep: expected linear or cosine"),
        (["--max-length", "1"], "no answer left within max_length=1 tokens"),
        (["--output", ""], "--output .: exists already"),
        (["--colour", "red"], "╭─ Error"),
        (["--batch-size", "many"], "╭─ Error"),
    ],
)
def test_a_bad_setting_is_one_line_and_leaves_nothing(
    terminal: Terminal,
    tmp_path: Path,
    more: list[str],
    message: str,
) -> None:
    output = tmp_path / "new" / "tuned"
    assert message in terminal.refusal(*terminal.finetuning(output, *more))


@pytest.mark.parametrize(
    ("option", "values", "message"),
    [
        ("--batch-size", ["0", "-1"], "≥ 1"),
        ("--accumulate", ["0"], "≥ 1"),
        ("--safety-batch-size", ["0"], "≥ 1"),
        ("--max-length", ["0", "-3"], "≥ 1"),
        ("--max-steps", ["0", "-5"], "≥ 1"),
        ("--log-every", ["0", "-1"], "≥ 1"),
        ("--save-every", ["0", "-1"], "≥ 1"),
        ("--direction-every", ["0"], "≥ 1"),
        ("--early-stop", ["0"], "≥ 1"),
        ("--tokens-per-step", ["0"], "≥ 1"),
        ("--lora-r", ["0"], "≥ 1"),
        ("--lora-alpha", ["0"], "≥ 1"),
        ("--epochs", ["0", "-1", "nan"], "> 0"),
        ("--probe-rows", ["0", "nan"], "> 0"),
        ("--probe-rows", ["1.5"], "≤ 1"),
        ("--lora-dropout", ["2"], "≤ 1"),
        ("--learning-rate", ["-1", "nan"], "≥ 0"),
        ("--learning-rate", ["inf"], "≤ 4294967295"),
        ("--weight-decay", ["-1"], "≥ 0"),
        ("--warmup-steps", ["-1"], "≥ 0"),
        ("--max-grad-norm", ["-1"], "≥ 0"),
        ("--probe-size", ["-1", "nan"], "≥ 0"),
        ("--safety-weight", ["-1"], "≥ 0"),
        ("--seed", ["-1"], "≥ 0"),
        ("--seed", ["99999999999999999999"], "≤ 4294967295"),
    ],
)
def test_a_number_out_of_range_names_the_option_and_the_range(
    terminal: Terminal, tmp_path: Path, option: str, values: list[str], message: str
) -> None:
    for value in values:
        for command in ("finetune", "compare"):
            output = tmp_path / "new" / "out"
            line = terminal.refusal(*terminal.command(command, output, option, value))
            assert line.startswith(f"Error: {option} {value}") and message in line


@pytest.mark.parametrize(
    ("given", "weight", "level"),
    [
        ({}, 0.3, "auto"),
        ({"safety_level": "always"}, 0.3, None),
        ({"safety_level": "0.7"}, 0.3, 0.7),
        ({"optimizer": "sap"}, 0.0, None),
        ({"optimizer": "sap", "safety_level": "auto"}, 0.0, "auto"),
        ({"optimizer": "adamw", "safety_level": "auto"}, 0.0, None),
        ({"optimizer": "sap", "safety_weight": 0.2}, 0.2, "auto"),
    ],
)
def test_blending_is_the_default_and_the_paper_has_none(
    given: dict[str, Any], weight: float, level: float | str | None
) -> None:
    settings = FinetuneSettings(model="m", task="t", output="o", **given)
    assert settings.optimizer == given.get("optimizer", "blend")
    options = settings.sap_options()
    assert options["safety_weight"] == weight
    assert options.get("safety_level") == level


def test_settings_become_the_arguments_that_make_them(chat_model: Path) -> None:
    settings = FinetuneSettings(
        model="m", task="t", output="o", full=True, lora_target="q,v", max_steps=3, probe_size=0.1
    )
    assert settings.arguments() == [
        *("--model", "m", "--task", "t", "--output", "o", "--full"),
        *("--lora-target", "q,v", "--max-steps", "3", "--probe-size", "0.1"),
    ]


def defaults(function: Any, *without: str) -> dict[str, Any]:
    """The default of every optional argument of a function."""
    parameters = inspect.signature(function).parameters.items()
    return {
        name: parameter.default
        for name, parameter in parameters
        if parameter.default is not inspect.Parameter.empty and name not in without
    }


def test_the_defaults_are_those_of_the_package() -> None:
    blend, sap = (
        FinetuneSettings(model="m", task="t", output="o", optimizer=optimizer)
        for optimizer in ("blend", "sap")
    )
    # The command line leaves these two as they are.
    assert sap.probe() == defaults(ProbeSet, "own_rows", "passes")
    # These are the trainer's.
    others = ("lr", "betas", "eps", "max_grad_norm", "backend", "grad_scaler")
    assert blend.sap_options() == defaults(BlendedAdamW, *others)
    assert sap.sap_options() == defaults(FusedSAP, *others)


def test_every_option_of_the_probe_and_of_blending_reaches_it() -> None:
    settings = FinetuneSettings(
        model="m",
        task="t",
        output="o",
        optimizer="sap",
        checkpointing="layers",
        safety_weight=0.2,
        safety_level="0.7",
        rule="floor",
        direction_every=5,
        probe_layers="0,2",
        probe_size=0.1,
        probe_rule="adam",
        probe_rows=0.5,
        rho="0.01",
        difference="forward",
        weight_decay=0.1,
    )
    assert settings.probe() == {
        "layers": [0, 2],
        "size": 0.1,
        "rule": "adam",
        "rows": 0.5,
        "rho": 0.01,
        "difference": "forward",
        "checkpointing": "layers",
    }
    assert settings.sap_options() == {
        "weight_decay": 0.1,
        "safety_weight": 0.2,
        "safety_level": 0.7,
        "rule": "floor",
        "direction_every": 5,
    }
