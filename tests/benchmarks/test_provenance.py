"""What CSVs say of themselves, and how rows are replaced."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from benchmarks import provenance
from tests.benchmarks.helpers import SURROUNDINGS, read


def test_what_is_measured_again_replaces_its_own_rows_only(tmp_path: Path) -> None:
    first = [
        {"dtype": dtype, "name": name, "old": 1} for dtype in ("fp32", "bf16") for name in "ab"
    ]
    provenance.write_rows("some.csv", first, tmp_path)
    before = read(tmp_path / "some.csv")
    again = [{"dtype": "fp32", "name": "a", "new": 2}]
    path = provenance.replace_rows("some.csv", again, ("dtype",), tmp_path)
    after = read(path)
    assert [{k: v for k, v in row.items() if k != "new"} for row in after[:2]] == before[2:]
    assert [(row["name"], row["old"], row["new"]) for row in after[2:]] == [("a", "", "2")]
    assert set(after[2]) >= SURROUNDINGS and list(after[2])[-1] == "commit"
    assert [file.name for file in tmp_path.iterdir()] == ["some.csv"]


def test_numbers_are_read_as_such(tmp_path: Path) -> None:
    (tmp_path / "some.csv").write_text("name,value\na,0.5\nb,\n", encoding="utf-8")
    assert provenance.read_numbers(tmp_path / "some.csv") == [
        {"name": "a", "value": 0.5},
        {"name": "b", "value": ""},
    ]
    assert provenance.read_rows(tmp_path / "none.csv") == []


def test_a_copy_of_the_files_says_which_commit_they_are_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SAP_FAST_COMMIT", "abc1234")
    assert provenance.commit() == "abc1234"
    # It speaks for these files, not for another checkout.
    assert provenance.commit(tmp_path) == "unknown"


def test_a_commit_whose_files_were_changed_is_dirty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        command = [
            "git",
            "-C",
            str(tmp_path),
            "-c",
            "user.name=a",
            "-c",
            "user.email=b",
            *arguments,
        ]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
        return subprocess.run(
            command, check=True, capture_output=True, text=True, env=environment
        ).stdout.strip()

    git("init")
    (tmp_path / "module.py").write_text("a = 1\n")
    git("add", ".")
    git("commit", "--message", "first")
    clean = git("rev-parse", "--short", "HEAD")
    assert provenance.commit(tmp_path) == clean
    (tmp_path / "notes.csv").write_text("a\n")
    assert provenance.commit(tmp_path) == clean
    (tmp_path / "module.py").write_text("a = 2\n")
    assert provenance.commit(tmp_path) == f"{clean}-dirty"
