"""lm-eval, both ways: its tasks as a measure of a model here, and our requests as tasks there."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from sap_fast.data.builtin import Kind, builtin_requests
from sap_fast.evaluation.bootstrap import Interval
from sap_fast.evaluation.refusals import refusal_pattern

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INSTALL = "pip install 'sap-fast[lm-eval]'"
"""What installs lm-eval in a version that is known to work."""

TASKS: dict[str, Kind] = {"sap_fast_refusals": "harmful", "sap_fast_over_refusals": "harmless"}
"""Our tasks, and the kind of requests that each asks."""

# Half the width of a 95 % interval, in standard errors.
_STANDARD_ERRORS = 1.96


class HarnessError(ValueError):
    """lm-eval is missing or cannot do what was asked, told in one line."""


def known_tasks(tasks: Sequence[str], folder: str | None = None) -> Any:
    """Checks that lm-eval is there and has tasks of these names.

    Args:
        tasks: Their names.
        folder: With tasks beside those of lm-eval itself, as its `include_path`.

    Returns:
        The task manager of lm-eval, for `task_accuracies`.

    Raises:
        HarnessError: It is missing, or has no task of a name.
    """
    if find_spec("lm_eval") is None:
        raise HarnessError(f"needs lm-eval: {INSTALL}")
    if folder is not None and not Path(folder).is_dir():
        raise HarnessError(f"{folder} is no folder; expected one with tasks of lm-eval")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=folder)
    for task in tasks:
        if task not in manager.all_tasks:
            raise HarnessError(f"lm-eval has no task {task}; `lm_eval ls tasks` prints all")
    return manager


def task_accuracies(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    manager: Any,
    *,
    limit: int | None = None,
    batch_size: int = 16,
) -> dict[str, Interval]:
    """Measures a model on tasks of lm-eval.

    The model's chat template frames the questions, where it has one.

    Args:
        model: A causal language model of transformers, or a PEFT model around one.
        tokenizer: Its tokenizer.
        tasks: Names of tasks or groups of them.
        manager: Of `known_tasks`.
        limit: Ask only the first questions of each task.
        batch_size: Sequences per batch.

    Returns:
        By task and metric the mean, with 1.96 of lm-eval's standard errors to both sides.

    Raises:
        HarnessError: A task cannot be run, or has no metric that is a share.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    was_training = model.training
    try:
        found = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            apply_chat_template=bool(tokenizer.chat_template),
            log_samples=False,
        )
    # Tasks fetch data and run code of their own, which raises errors of many types.
    except Exception as error:
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise HarnessError(f"{','.join(tasks)}: {why}") from error
    finally:
        model.train(was_training)
    return accuracies_of(found)


def accuracies_of(found: Mapping[str, Any]) -> dict[str, Interval]:
    """Returns the accuracies in what `simple_evaluate` returned.

    Of every task it is the first metric that is a share, with the first of its filters.

    Raises:
        HarnessError: A task has none.
    """
    accuracies = {}
    for task, counts in found["n-samples"].items():
        results = found["results"][task]
        for key, value in results.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr"):
                continue
            if not isinstance(value, (int, float)) or not 0 <= value <= 1:
                continue
            error = results.get(f"{metric}_stderr,{filtered}")
            error = float(error) if isinstance(error, (int, float)) else 0.0
            half = 0.0 if math.isnan(error) else _STANDARD_ERRORS * error
            name = f"{task} ({metric})" if filtered == "none" else f"{task} ({metric}, {filtered})"
            accuracies[name] = Interval(
                float(value), max(0.0, value - half), min(1.0, value + half), counts["effective"]
            )
            break
        else:
            metrics = ", ".join(key for key in results if "," in key and "_stderr" not in key)
            raise HarnessError(
                f"the task {task} reports {metrics or 'nothing'}; expected a share, such as acc or "
                "exact_match"
            )
    return accuracies


def write_tasks(folder: Path) -> list[str]:
    """Writes our tasks for `lm_eval --include_path`: the evaluation half of the built-in requests.

    The folder needs nothing of this package, and can be moved.

    Args:
        folder: To write into; it is made.

    Returns:
        The names of the tasks, and of the group of both.

    Raises:
        OSError: The folder cannot be written.
    """
    folder.mkdir(parents=True)
    source = Path(__file__).with_name("lm_eval_tasks")
    for path in sorted(source.iterdir()):
        if path.suffix in (".py", ".yaml"):
            (folder / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "refusal_pattern.txt").write_text(refusal_pattern() + "\n", encoding="utf-8")
    for task, kind in TASKS.items():
        rows = [
            {"id": each.id, "category": each.category, "prompt": each.prompt}
            for each in builtin_requests("evaluation", kind)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{task}.jsonl").write_text(text, encoding="utf-8")
    return [*TASKS, "sap_fast_safety"]
