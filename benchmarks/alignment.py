"""Aligned starting points: models that are taught to refuse.

SmolLM2-135M-Instruct as shipped refuses hardly anything, so there would be no safety to lose. A
full fine-tuning on stock refusals among ordinary instructions teaches it to; that takes minutes on
a CPU, and is done once and kept in the cache. Gemma-3-270M, a base model, learns to chat by it,
too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from filelock import FileLock

from benchmarks import assets
from sap_fast.cli.finetune import finetune
from sap_fast.cli.settings import FinetuneSettings
from sap_fast.data import REFUSALS

#: Rows of AdvBench (0–199 are for training) and of Alpaca that the model is aligned on.
REFUSED = slice(0, 120)
INSTRUCTIONS = slice(0, 200)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    """Write rows as JSONL, and return the path as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def alignment_rows() -> list[dict[str, Any]]:
    """Return 120 harmful requests with stock refusals, and 200 instructions with answers."""
    refused = [
        {
            "messages": [
                {"role": "user", "content": request},
                {"role": "assistant", "content": REFUSALS[index % len(REFUSALS)]},
            ]
        }
        for index, request in enumerate(assets.harmful_requests()[REFUSED])
    ]
    answered = [
        {
            "messages": [
                {"role": "user", "content": f"{row['instruction']}\n\n{row['input']}".strip()},
                {"role": "assistant", "content": row["output"]},
            ]
        }
        for row in assets.alpaca_rows()[INSTRUCTIONS]
    ]
    return refused + answered


def aligned_smollm2(seed: int = 0) -> Path:
    """Return the folder of the aligned SmolLM2, after aligning it if it is not in the cache.

    Interrupted, the alignment goes on where it stopped. A process that asks for the model while
    another aligns it waits for that one.

    Args:
        seed: of the order of rows.
    """
    return _aligned("smollm2", assets.smollm2_folder(), alignment_rows(), 50, seed)


def aligned_gemma3(seed: int = 0) -> Path:
    """Return the folder of the aligned Gemma; as `aligned_smollm2`, with more rows to chat by."""
    chats = assets.chat_rows()[:300]
    return _aligned("gemma3", assets.gemma3_folder(), alignment_rows() + chats, 80, seed)


def _aligned(name: str, model: Path, rows: list[dict[str, Any]], steps: int, seed: int) -> Path:
    settings = FinetuneSettings(
        model=str(model),
        task="",
        output="",
        optimizer="adamw",
        full=True,
        max_steps=steps,
        batch_size=8,
        learning_rate=3e-5,
        lr_schedule="constant",
        max_length=128,
        precision="fp32",
        log_every=5,
        save_every=20,
        seed=seed,
    )
    # Rows and what is set decide the result; where files happen to lie, and new options, do not.
    given = dataclasses.replace(settings, model="").arguments()
    content = [rows, model.name, given]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
    folder = assets.cache_folder() / f"{name}-aligned-{digest}"
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            task = write_rows(assets.cache_folder() / f"alignment-rows-{digest}.jsonl", rows)
            finetune(FinetuneSettings(**{**vars(settings), "task": task, "output": str(folder)}))
    return folder
