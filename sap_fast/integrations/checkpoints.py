"""Checkpoints of a trainer that can be resumed from."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME


def last_complete_checkpoint(folder: str | Path) -> str | None:
    """Return the newest checkpoint in a trainer's output folder that was written to its end.

    transformers writes into the folder that it later resumes from, its state last of all. A process
    killed meanwhile leaves one without that state, or with half of it; with
    `transformers.trainer_utils.get_last_checkpoint` the run could not be resumed.

    Args:
        folder: `TrainingArguments.output_dir`; it need not exist.

    Returns:
        The path of the checkpoint; None if there is no complete one.
    """
    checkpoints = {
        int(path.name.removeprefix("checkpoint-")): path
        for path in Path(folder).glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdecimal()
    }
    for _, path in sorted(checkpoints.items(), reverse=True):
        try:
            json.loads((path / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError, ValueError):
            warnings.warn(f"{path} is incomplete and is not resumed from", stacklevel=2)
        else:
            return str(path)
    return None
