"""What the tests of benchmarks share."""

from __future__ import annotations

import csv
from pathlib import Path

from benchmarks.workloads import Case

#: A tiny model with LoRA on random rows.
QUICK = Case("lora", "4x96", "fp32", "tiny")
#: Columns that every CSV carries.
SURROUNDINGS = {"date", "device", "torch", "transformers", "commit"}


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def is_picture(path: Path) -> bool:
    content = path.read_bytes()
    return content.startswith(b"\x89PNG") and len(content) > 10_000
