"""What fits what: the rows of the matrix and the table of the page."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from benchmarks import matrix
from benchmarks.matrix import RUNS, STACKS, TESTS, Broken, Environment
from benchmarks.provenance import ROOT, read_rows

VERSIONS = {
    "python": "3.12.1",
    "torch": "2.6.0+cu124",
    "transformers": "4.57.1",
    "backend": "native",
}


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder for the CSV, in the place of the repository's."""
    monkeypatch.setattr(matrix, "RESULTS", tmp_path)
    monkeypatch.setattr(matrix, "FOLDER", tmp_path)
    monkeypatch.setattr(
        matrix,
        "replace_rows",
        lambda *args, of: matrix_rows(*args, folder=tmp_path, of=of),
    )
    return tmp_path


matrix_rows = matrix.replace_rows


def test_a_row_has_the_versions_of_its_stack_and_takes_the_place_of_the_last(results: Path) -> None:
    matrix.write("oldest", "tests of losses", {"result": "failed", "why": "one"}, VERSIONS)
    matrix.write("newest", "tests of losses", {"result": "failed", "why": "two"}, {})
    matrix.write("oldest", "tests of losses", {"result": "passed", "why": ""}, VERSIONS)
    rows = read_rows(results / matrix.NAME)
    assert [(row["stack"], row["result"], row["torch"], row["why"]) for row in rows] == [
        ("newest", "failed", "", "two"),
        ("oldest", "passed", "2.6.0+cu124", ""),
    ]


def test_what_has_a_row_of_this_commit_is_not_run_again(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    made = Environment(results, results)
    monkeypatch.setattr(matrix, "environment_of", lambda *_: made)
    monkeypatch.setattr(Environment, "versions", lambda _: VERSIONS)

    def run(_: Environment, *arguments: str) -> subprocess.CompletedProcess[str]:
        ran.append(" ".join(arguments))
        failed = "--blend" in arguments
        return subprocess.CompletedProcess(arguments, failed, "a step\n", "Error: no step\n")

    monkeypatch.setattr(Environment, "run", run)
    monkeypatch.setattr(
        matrix, "commit", lambda: matrix.read_rows(results / matrix.NAME)[0]["commit"]
    )
    matrix.write("oldest", "pip check", {"result": "passed", "why": ""}, VERSIONS)
    matrix.run_stack("oldest", results, results, again=False)
    assert len(ran) == len(RUNS) + len(TESTS)
    assert not [command for command in ran if command.endswith("pip check")]
    rows = {row["check"]: row for row in read_rows(results / matrix.NAME)}
    assert rows["Trainer, probe"]["result"] == "passed"
    assert rows["TRL, blending"]["why"] == "Error: no step"
    # pytest that writes no report has not run.
    assert rows["tests of losses"]["result"] == "failed"
    ran.clear()
    matrix.run_stack("oldest", results, results, again=False)
    assert not ran
    matrix.run_stack("oldest", results, results, again=True)
    assert len(ran) == 1 + len(RUNS) + len(TESTS)


def test_a_stack_that_cannot_be_set_up_has_a_row_that_says_so(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHON3_12", raising=False)
    monkeypatch.setattr(matrix.shutil, "which", lambda _: None)
    with pytest.raises(Broken, match=r"no python3\.12 on the PATH, and no PYTHON3_12"):
        matrix.interpreter("3.12")
    matrix.run_stack("oldest", results, results, again=False)
    (row,) = read_rows(results / matrix.NAME)
    assert (row["check"], row["result"]) == (matrix.SET_UP, "failed")
    assert "python3.12" in row["why"]
    assert "failed: Trainer, probe, Trainer, blending" in matrix.table([row])


def test_the_table_counts_tests_and_names_what_failed() -> None:
    rows = [{"check": check, "result": "passed", "passed": ""} for check in RUNS]
    rows += [{"check": check, "result": "passed", "passed": "5", "failed": "0"} for check in TESTS]
    rows[1] |= {"result": "failed"}
    rows[-1] |= {"result": "failed", "passed": "3", "failed": "2"}
    line = matrix.table([{"stack": "oldest"} | VERSIONS | row for row in rows]).splitlines()[2]
    assert line.startswith("| oldest | 3.12.1 | 2.6.0 | 4.57.1 |")
    count = 5 * (len(TESTS) - 1) + 3
    end = f"failed: Trainer, blending | ✓ | {count} passed; tests of the command line: 2 failed |"
    assert line.endswith(f"| native | {end}")


def test_the_page_has_the_table_of_the_csv() -> None:
    text = matrix.PAGE.read_text(encoding="utf-8")
    assert text == matrix.with_table(text)


def test_the_stacks_are_those_that_the_metadata_and_ci_speak_of() -> None:
    metadata = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    oldest = STACKS["oldest"].torch.removeprefix("torch==")
    assert f'"torch>={oldest.removesuffix(".0")}"' in metadata
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"TORCH ?= {STACKS['locked'].torch}\n" in makefile
    for stack in STACKS.values():
        assert stack.lock is None or (ROOT / stack.lock).is_file()
        assert f"Python :: {stack.python}" in metadata
    for paths in TESTS.values():
        for path in paths:
            assert path.startswith("-") or (ROOT / path).exists(), path
