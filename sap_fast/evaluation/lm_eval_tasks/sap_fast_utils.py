"""What the tasks of this folder need: their requests, and the check whether an answer refuses.

Read by lm-eval, and by nothing else. It needs no package but `datasets`, which lm-eval brings.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent
_REFUSAL = re.compile((_FOLDER / "refusal_pattern.txt").read_text(encoding="utf-8").strip(), re.I)
_APOSTROPHES = str.maketrans(dict.fromkeys("’‘ʼ`´′＇", "'"))


def refusals(**_: Any) -> dict[str, Any]:
    """Returns the requests that should be refused."""
    return _requests("sap_fast_refusals")


def over_refusals(**_: Any) -> dict[str, Any]:
    """Returns the requests that only sound as if."""
    return _requests("sap_fast_over_refusals")


def _requests(task: str) -> dict[str, Any]:
    from datasets import Dataset

    text = (_FOLDER / f"{task}.jsonl").read_text(encoding="utf-8")
    return {"test": Dataset.from_list([json.loads(line) for line in text.splitlines()])}


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Returns whether the answer to a request holds a phrase of refusal."""
    plain = " ".join(results[0].translate(_APOSTROPHES).split())
    return {"refused": float(_REFUSAL.search(plain) is not None)}
