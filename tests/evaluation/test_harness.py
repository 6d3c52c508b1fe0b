"""Tasks of lm-eval as a measure, and our requests as tasks of lm-eval."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml

from sap_fast.data import builtin_requests
from sap_fast.evaluation import Interval, is_refusal
from sap_fast.evaluation.harness import (
    TASKS,
    HarnessError,
    accuracies_of,
    known_tasks,
    task_accuracies,
    write_tasks,
)

# As `simple_evaluate` returns them.
FOUND = {
    "results": {
        "gsm8k": {
            "alias": "gsm8k",
            "exact_match,strict-match": 0.25,
            "exact_match_stderr,strict-match": 0.1,
            "exact_match,flexible-extract": 0.5,
            "exact_match_stderr,flexible-extract": 0.1,
        },
        "text": {"perplexity,none": 12.0, "acc,none": 1.0, "acc_stderr,none": "N/A"},
    },
    "n-samples": {
        "gsm8k": {"original": 1319, "effective": 20},
        "text": {"original": 5, "effective": 5},
    },
}


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """In the place of lm-eval; what it was asked."""
    asked: dict[str, Any] = {}

    class TaskManager:
        def __init__(self, include_path: str | None) -> None:
            self.all_tasks = ["gsm8k", "text", *(["own"] if include_path else [])]

    class HFLM:
        def __init__(self, **given: Any) -> None:
            asked.update(given)

    def simple_evaluate(model: Any, **given: Any) -> dict[str, Any]:
        asked.update(given)
        asked["pretrained"].eval()
        if given["tasks"] == ["text"]:
            raise KeyError("no data")
        return FOUND

    for name, content in {
        "lm_eval": {"simple_evaluate": simple_evaluate},
        "lm_eval.tasks": {"TaskManager": TaskManager},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": HFLM},
    }.items():
        module = ModuleType(name)
        module.__dict__.update(content, __spec__=ModuleSpec(name, None))
        monkeypatch.setitem(sys.modules, name, module)
    return asked


def test_of_every_task_the_first_share_is_taken() -> None:
    assert accuracies_of(FOUND) == {
        "gsm8k (exact_match, strict-match)": Interval(0.25, 0.25 - 0.196, 0.25 + 0.196, 20),
        "text (acc)": Interval(1.0, 1.0, 1.0, 5),
    }
    without = {"results": {"text": {"perplexity,none": 12.0}}, "n-samples": {"text": {}}}
    with pytest.raises(HarnessError, match="text reports perplexity,none; expected a share"):
        accuracies_of(without)


def test_the_model_is_asked_as_it_is_and_left_so(stand_in: dict[str, Any]) -> None:
    manager = known_tasks(["gsm8k"])
    trained = SimpleNamespace(
        training=True, eval=lambda: None, train=lambda mode: modes.append(mode)
    )
    modes: list[bool] = []
    tokenizer: Any = SimpleNamespace(chat_template="{{ messages }}")
    found = task_accuracies(trained, tokenizer, ["gsm8k"], manager, limit=3, batch_size=2)  # type: ignore[arg-type]
    assert found == accuracies_of(FOUND)
    assert stand_in["pretrained"] is trained and stand_in["tokenizer"] is tokenizer
    assert (stand_in["limit"], stand_in["batch_size"]) == (3, 2)
    assert stand_in["apply_chat_template"] is True and stand_in["task_manager"] is manager
    assert modes == [True]
    with pytest.raises(HarnessError, match="text: 'no data'"):
        task_accuracies(trained, tokenizer, ["text"], manager)  # type: ignore[arg-type]


def test_unknown_tasks_and_folders_are_named(stand_in: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match="lm-eval has no task own"):
        known_tasks(["gsm8k", "own"])
    known_tasks(["gsm8k", "own"], str(tmp_path))
    with pytest.raises(HarnessError, match=r"nowhere is no folder"):
        known_tasks(["gsm8k"], "nowhere")


def test_without_lm_eval_the_error_says_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sap_fast.evaluation.harness.find_spec", lambda _: None)
    with pytest.raises(HarnessError, match=re.escape("pip install 'sap-fast[lm-eval]'")):
        known_tasks(["gsm8k"])


def utilities(folder: Path) -> Any:
    spec = importlib.util.spec_from_file_location("utilities", folder / "sap_fast_utils.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_folder_has_the_evaluation_half_and_judges_as_we_do(tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    assert write_tasks(folder) == ["sap_fast_refusals", "sap_fast_over_refusals", "sap_fast_safety"]
    for task, kind in TASKS.items():
        rows = [json.loads(line) for line in (folder / f"{task}.jsonl").read_text().splitlines()]
        expected = builtin_requests("evaluation", kind)
        assert [(row["id"], row["prompt"]) for row in rows] == [
            (request.id, request.prompt) for request in expected
        ]
        text = (folder / f"{task}.yaml").read_text().replace("!function ", "")
        assert yaml.safe_load(text)["task"] == task
    judge = utilities(folder)
    answers = ["I can’t help.", "I'm SORRY", "Sure, sorrybye", "i do\nnot  feel comfortable", ""]
    for answer in answers:
        refused = judge.process_results({}, [answer])["refused"]
        assert refused == float(is_refusal(answer)), answer
    assert {path.suffix for path in folder.iterdir()} == {".jsonl", ".yaml", ".py", ".txt"}


def test_lm_eval_runs_our_tasks(tmp_path: Path, refusing_model: Any, tokenizer: Any) -> None:
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'sap-fast[lm-eval]'")
    folder = tmp_path / "tasks"
    write_tasks(folder)
    manager = known_tasks(["sap_fast_safety"], str(folder))
    found = task_accuracies(refusing_model, tokenizer, ["sap_fast_safety"], manager, limit=3)
    assert list(found) == ["sap_fast_refusals (refused)", "sap_fast_over_refusals (refused)"]
    assert all(0 <= share.mean <= 1 and share.count == 3 for share in found.values())
