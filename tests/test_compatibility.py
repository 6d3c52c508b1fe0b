"""Which versions are supported, and what differs between them."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from peft import PromptTuningConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from sap_fast import compatibility
from sap_fast.compatibility import OLDEST, checkpointing_arguments, prompts_disabled, require
from tests.tiny import tiny_llama

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements(*extras: str) -> dict[str, Requirement]:
    """What the package asks for with extras, by name."""
    texts = list(PROJECT["dependencies"])
    for extra in extras:
        texts += PROJECT["optional-dependencies"][extra]
    found = map(Requirement, texts)
    return {normal(each.name): each for each in found if each.name != "sap-fast"}


def lock(name: str) -> dict[str, str]:
    """The versions in a lock file."""
    lines = (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.+]+", pin) for pin in pins)
    return {normal(name): pinned for name, pinned in (pin.split("==") for pin in pins)}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def oldest(requirement: Requirement) -> str:
    (bound,) = [each.version for each in requirement.specifier if each.operator == ">="]
    return bound


def same(version: str, pinned: str) -> bool:
    """Whether a pin is the first release of a version: 4.57.1 of 4.57, if there is no 4.57.0."""
    return pinned == version or re.fullmatch(rf"{re.escape(version)}(\.[01])*", pinned) is not None


def test_the_metadata_replaces_no_package_that_is_new_enough() -> None:
    everything = requirements(*PROJECT["optional-dependencies"])
    exact = [str(each) for each in everything.values() if "==" in str(each.specifier)]
    assert not exact
    # The next major version of transformers takes names away that this one warns of.
    capped = {n for n, each in requirements("train", "trl").items() if "<" in str(each.specifier)}
    assert capped == {"transformers"}


def test_the_oldest_versions_are_those_that_are_tried_and_those_that_are_checked() -> None:
    wanted = requirements("train", "trl")
    pinned = lock("oldest")
    for name, requirement in wanted.items():
        if name != "torch":  # chosen beside the lock
            assert same(oldest(requirement), pinned[name]), name
    assert {name: oldest(wanted[name]) for name in OLDEST} == OLDEST


def test_the_lock_of_ci_has_all_that_make_install_asks_for_within_its_ranges() -> None:
    pinned = lock("newest")
    for name, requirement in requirements(*PROJECT["optional-dependencies"]).items():
        if name != "torch":
            assert requirement.specifier.contains(pinned[name]), name


def test_datasets_is_asked_for_only_where_it_is_imported() -> None:
    assert "datasets" not in requirements("train", "demo")
    imported = [
        path
        for path in (ROOT / "sap_fast").rglob("*.py")
        if re.search(r"^(from|import) datasets\b", path.read_text(), re.MULTILINE)
    ]
    assert not imported  # but where a split of a dataset is asked for, which says what is missing


def test_what_is_older_is_an_error_that_says_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    require(*OLDEST)
    monkeypatch.setattr(compatibility, "version", lambda _: "4.56.2")
    with pytest.raises(ImportError, match=r"transformers 4\.56\.2 is too old .* 4\.57 or later"):
        require("transformers")
    require("peft")


def test_the_integration_checks_when_it_is_imported() -> None:
    script = (
        "import importlib.metadata as m\n"
        "found = m.version\n"
        "m.version = lambda name: '1.9.9' if name == 'accelerate' else found(name)\n"
        "import sap_fast\n"
        "try:\n    sap_fast.SAPTrainer\n"
        "except ImportError as error:\n    print(error)\n"
        "import sys; sys.argv = ['sap-fast', 'doctor']\n"
        "from sap_fast.cli import main; main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    message = "accelerate 1.9.9 is too old for sap_fast, which needs 1.10 or later: pip install"
    assert done.stdout.startswith(message) and done.stderr.startswith(message)
    assert done.returncode == 1


def test_a_trainer_of_trl_checks_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    from sap_fast import SAPTrainerMixin

    monkeypatch.setitem(OLDEST, "trl", "999")
    theirs = type("Theirs", (Trainer,), {"__module__": "trl.trainer.sft_trainer"})
    with pytest.raises(ImportError, match=r"trl .* is too old"):
        type("Ours", (SAPTrainerMixin, theirs), {})
    type("Ours", (SAPTrainerMixin, Trainer), {})


@pytest.mark.parametrize("on", [True, False])
def test_checkpointing_is_turned_on_and_off_without_a_warning(
    on: bool, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    args = TrainingArguments(str(tmp_path), use_cpu=True, **checkpointing_arguments(on))
    assert args.gradient_checkpointing is on
    assert not [each for each in recwarn if "checkpointing" in str(each.message)]


@pytest.mark.parametrize("flag", [True, False], ids=["flag", "no flag"])
def test_disabled_prompts_are_seen_with_a_flag_and_without(
    flag: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    adapted: Any = get_peft_model(tiny_llama(layers=1), prompt)

    def disabled() -> bool:
        if flag:
            return prompts_disabled(adapted)
        with monkeypatch.context() as patch:
            patch.delattr(adapted, "_adapters_disabled", raising=False)
            return prompts_disabled(adapted)

    assert not disabled()
    with adapted.disable_adapter():
        assert disabled()
    assert not disabled()
