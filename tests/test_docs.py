"""README and site build, their links and their code work, their figures are those of the CSV."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from transformers import AutoTokenizer

from benchmarks import front
from tests.tiny import Batch, problem

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
#: Pages whose code needs several processes; the examples run the same loops on two ranks.
ON_SEVERAL_RANKS = {"how-to/deepspeed.md", "how-to/fsdp2.md"}
#: Pages whose code needs packages of `make test-stacks`, where the examples run it.
OF_STACKS = {"how-to/faster-kernels.md", "how-to/other-loops.md"}


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


WITH_CODE = [str(page.relative_to(DOCS)) for page in PAGES if blocks(page)]


def encoded(batch: Batch) -> list[dict[str, list[int]]]:
    """The rows of a batch as a dataset has them, without padding."""
    kept = batch["attention_mask"].sum(1).tolist()
    return [
        {key: batch[key][row, :length].tolist() for key in ("input_ids", "labels")}
        for row, length in enumerate(kept)
    ]


@pytest.fixture
def names(chat_model: Path, files: dict[str, str], tmp_path: Path) -> dict[str, Any]:
    """What the pages call yours."""
    case = problem()
    chosen, rejected = encoded(case.chosen), encoded(case.rejected)
    return {
        "model": case.model,
        "batch": case.batch,
        "pairs": {"chosen": case.chosen, "rejected": case.rejected},
        "accelerator": Accelerator(cpu=True),
        "folder": str(tmp_path / "trainer"),
        "train_dataset": encoded(case.batch),
        "safety_dataset": [
            {"chosen": a, "rejected": b} for a, b in zip(chosen, rejected, strict=True)
        ],
        "safety_file": files["safety"],
        "tokenizer": AutoTokenizer.from_pretrained(chat_model),
    }


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    for page in PAGES:
        assert (tmp_path / page.relative_to(DOCS).with_suffix(".html")).exists(), page
    # Nothing is loaded from elsewhere.
    start = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert not re.findall(
        r'<(?:script|img)[^>]+src="https?:|<link[^>]+stylesheet[^>]+"https?:', start
    )


def test_the_readme_is_a_front_door() -> None:
    lines = front.README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 170
    first_screen = "\n".join(lines[:30])
    for wanted in ("![", "pip install", "make demo", "make test"):
        assert wanted in first_screen, wanted


def test_the_readme_and_its_picture_have_the_figures_of_the_csv() -> None:
    text = front.README.read_text(encoding="utf-8")
    assert text == front.with_table(text)
    assert front.PICTURE.read_text(encoding="utf-8") == front.picture()


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_every_relative_link_leads_to_a_file(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", text):
        assert (page.parent / target).is_file(), target


def test_every_place_that_a_change_touches_is_there() -> None:
    text = (DOCS / "changing-it.md").read_text(encoding="utf-8")
    places = re.findall(r"`((?:sap_fast|csrc|tests|benchmarks|examples)/[\w./]*)`", text)
    assert len(places) > 15
    for place in places:
        assert (ROOT / place).exists(), place


@pytest.mark.parametrize("page", WITH_CODE)
def test_the_code_of_a_page_runs(
    page: str, names: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for number, block in enumerate(blocks(DOCS / page)):
        code = compile(block, f"{page}, block {number + 1}", "exec")
        if page not in ON_SEVERAL_RANKS | OF_STACKS:
            exec(code, names)
