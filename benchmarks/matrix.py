"""What fits what: the wheel, a run of each trainer and the tests, in environments of several ages.

    python -m benchmarks.matrix [--only STACK …] [--again] [--table]        or: make matrix

Makes a virtual environment for each of `STACKS` under build/matrix, or in the folder that
SAP_FAST_MATRIX names. Interpreters are `python3.12` and so on of the PATH, or what PYTHON3_12
names. Each environment gets the wheel of the package, built here without kernels; SAP_FAST_WHEELS
names a folder of wheels to choose from instead. The tests run from a copy without sap_fast, so that
the installed one is tested. A row of matrix.csv is written as soon as it is known, and what has a
row of this commit is not run again without --again. The table of docs/fits.md is written last;
`--table` writes nothing else.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.provenance import RESULTS, ROOT, commit, read_rows, replace_rows
from sap_fast import __version__

NAME = "matrix.csv"
PAGE = ROOT / "docs" / "fits.md"
BEGIN, END = "<!-- from matrix.csv -->\n", "<!-- until here -->\n"
FOLDER = Path(os.environ.get("SAP_FAST_MATRIX", ROOT / "build" / "matrix")).resolve()


class Stack(NamedTuple):
    """An environment: an interpreter, a torch, and what else pip is asked for."""

    python: str
    torch: str
    requirements: tuple[str, ...]
    lock: str | None = None
    """a constraints file for the rest"""


# The oldest that pyproject.toml lets in, two of the time between, what CI and `make demo` run on,
# and the newest that pip finds.
STACKS = {
    "oldest": Stack("3.12", "torch==2.6.0", (), "requirements/oldest.txt"),
    "early 5": Stack(
        "3.13",
        "torch==2.10.0",
        ("transformers==5.0.0", "peft==0.18.1", "accelerate==1.12.0", "trl==0.27.2"),
    ),
    "middle 5": Stack(
        "3.11",
        "torch==2.13.0",
        ("transformers==5.10.4", "peft==0.19.1", "accelerate==1.14.0", "trl==1.6.0"),
    ),
    "locked": Stack("3.11", "torch==2.13.0", (), "requirements/newest.txt"),
    "newest": Stack("3.11", "torch", ()),
}
#: Extras of the package that are tried, and what runs the tests.
EXTRAS = "train,trl"
TOOLS = (
    "pytest>=8",
    "hypothesis>=6",
    "psutil>=5",
    "setuptools",
    "gguf>=0.19",
    "pyyaml",
    "filelock",
)

RUNS = {
    "Trainer, probe": ("trainer_lora.py",),
    "Trainer, blending": ("trainer_lora.py", "--blend"),
    "TRL, probe": ("trl_sft.py",),
    "TRL, blending": ("trl_sft.py", "--blend"),
}
#: Of the tests that are not slow, those that meet most of other packages: minutes in each stack.
TESTS = {
    "tests of trainers": ("tests/integrations/test_trainer.py",),
    "tests of losses": tuple(
        f"tests/losses/test_{name}.py" for name in ("task", "pairs", "forward", "own_loss")
    ),
    "tests of packing": ("tests/losses/test_packable.py", "tests/losses/test_packing.py"),
    "tests of probes": ("tests/model/test_probes.py", "tests/model/test_layers.py"),
    "tests of the step": ("tests/test_sap.py",),
    "tests of the command line": ("tests/cli/test_finetune.py", "tests/cli/test_app.py"),
}
#: Columns of the table in docs/fits.md: a package, or what was checked.
SET_UP = "set up"
PACKAGES = ("python", "torch", "transformers", "peft", "accelerate", "trl")

Row = dict[str, str]


class Broken(Exception):
    """Something of a stack cannot be set up; the message says what."""


class Environment(NamedTuple):
    """A virtual environment with the package in it."""

    root: Path
    copy: Path
    """tests, examples and benchmarks, without sap_fast"""

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run its interpreter beside the copy, with nothing of the clone on its path."""
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [str(self.root / "bin" / "python"), *arguments]
        return subprocess.run(command, cwd=self.copy, env=kept, capture_output=True, text=True)

    def versions(self) -> dict[str, str]:
        """Return the device, the versions and the backend of its own sap_fast."""
        code = (
            "import json; from sap_fast import ops; "
            "from sap_fast.cli.environment import environment; "
            "print(json.dumps(environment() | {'backend': ops.choose_backend('auto', 'cpu')}))"
        )
        done = self.run("-W", "ignore", "-c", code)
        if done.returncode != 0:
            raise Broken(f"the package cannot be imported: {last_line(done)}")
        return json.loads(done.stdout.splitlines()[-1])


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """Return what a failed program said last, of its errors if it said any."""
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|ERROR)\b", line)]
    return [f"exit status {done.returncode}", *lines, *errors][-1][:300]


def interpreter(version: str) -> str:
    """Return the command of a Python of this version.

    Raises:
        Broken: there is none.
    """
    variable = f"PYTHON{version.replace('.', '_')}"
    found = os.environ.get(variable) or shutil.which(f"python{version}")
    if found is None:
        raise Broken(f"there is no python{version} on the PATH, and no {variable}")
    return found


def source_tree(folder: Path) -> Path:
    """Copy what the package is built from, so that nothing is left in the clone."""
    shutil.rmtree(folder, ignore_errors=True)
    generated = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("sap_fast", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=generated)
    for path in ROOT.iterdir():
        if (
            path.is_file()
            and path.suffix in (".py", ".toml", ".in", ".md", "")
            and path.name[0] != "."
        ):
            shutil.copy(path, folder)
    return folder


def is_of_a_commit(folder: Path) -> bool:
    """Say whether a folder is there and holds what its name says: nothing changed since then."""
    return folder.exists() and not folder.name.endswith("-dirty")


def wheels() -> Path:
    """Return the folder with the wheels that environments take the package from.

    Raises:
        Broken: the wheel cannot be built.
    """
    given = os.environ.get("SAP_FAST_WHEELS")
    if given:
        return Path(given).resolve()
    folder = FOLDER / f"wheels-{commit()}"
    if is_of_a_commit(folder):
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(folder)]
    surroundings = os.environ | {"SAP_FAST_BUILD": "0"}
    tree = source_tree(FOLDER / "source")
    done = subprocess.run(
        [*command, str(tree)], cwd=FOLDER, env=surroundings, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise Broken(f"the wheel cannot be built: {last_line(done)}")
    return folder


def copy_of_tests() -> Path:
    """Copy what runs in the environments, without sap_fast."""
    folder = FOLDER / f"tests-{commit()}"
    if is_of_a_commit(folder):
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("tests", "examples", "benchmarks", "requirements"):
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "CHANGELOG.md", "Makefile"):
        shutil.copy(ROOT / name, folder)
    return folder


def environment_of(name: str, stack: Stack, packages: Path, copy: Path) -> Environment:
    """Make the environment of a stack, or take the one there is, and install the package anew.

    Raises:
        Broken: pip or the interpreter cannot do it.
    """
    root = FOLDER / name.replace(" ", "-")
    made = Environment(root, copy)

    def pip(*arguments: str) -> None:
        quiet = ["--quiet", "--disable-pip-version-check"]
        done = made.run("-m", "pip", "install", *quiet, *arguments)
        if done.returncode != 0:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            raise Broken(f"pip: {errors[0] if errors else last_line(done)}")

    if not (root / "complete").exists():
        shutil.rmtree(root, ignore_errors=True)
        subprocess.run([interpreter(stack.python), "-m", "venv", str(root)], check=True)
    limits = ["--constraint", str(ROOT / stack.lock)] if stack.lock else []
    found = ["--find-links", str(packages)]
    if stack.torch != "torch" or not (root / "complete").exists():
        pip(stack.torch, *limits)
    pip(
        f"sap-fast[{EXTRAS}]=={__version__}",
        *stack.requirements,
        *TOOLS,
        stack.torch,
        *limits,
        *found,
    )
    # Of the same version, but of other code.
    pip("--force-reinstall", "--no-deps", f"sap-fast=={__version__}", *found)
    (root / "complete").touch()
    return made


def checks(made: Environment, known: set[str]) -> Iterator[tuple[str, Row]]:
    """Run the checks that are not known in an environment; yield name and result of each."""
    if "pip check" not in known:
        yield "pip check", outcome(made.run("-m", "pip", "check"))
    for name, (script, *options) in RUNS.items():
        if name not in known:
            command = [f"examples/{script}", "--tiny", "--steps", "2", *options]
            yield name, outcome(made.run(*command))
    for name, paths in TESTS.items():
        if name not in known:
            yield name, tested(made, *paths)


def outcome(done: subprocess.CompletedProcess[str]) -> Row:
    """Return the result of a program that passes or fails."""
    passed = done.returncode == 0
    return {"result": "passed" if passed else "failed", "why": "" if passed else last_line(done)}


def tested(made: Environment, *paths: str) -> Row:
    """Run tests that are not slow; return how many ended how, and the first that failed."""
    report = made.root / "report.xml"
    report.unlink(missing_ok=True)
    options = ["-q", "-m", "not slow and not gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]
    done = made.run("-m", "pytest", *options, *paths)
    if not report.exists():
        return {"result": "failed", "why": last_line(done)}
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    count = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    first = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return {
        "result": "passed" if done.returncode == 0 else "failed",
        "passed": str(count["tests"] - failed - count["skipped"]),
        "failed": str(failed),
        "skipped": str(count["skipped"]),
        "why": first[0][:300] if first else "",
    }


def run_stack(
    name: str, packages: Path, copy: Path, again: bool, only: list[str] | None = None
) -> None:
    """Set up a stack, run its checks, or some of them, and write a row for each."""
    here, rows = commit(), read_rows(RESULTS / NAME)
    known = {row["check"] for row in rows if (row["stack"], row["commit"]) == (name, here)}
    if again:
        known = set()
    if only is not None:
        known |= {"pip check", *RUNS, *TESTS} - set(only)
    if known >= {"pip check", *RUNS, *TESTS}:
        print(f"{name}: nothing to do", flush=True)
        return
    try:
        made = environment_of(name, STACKS[name], packages, copy)
        versions = made.versions()
    except (Broken, subprocess.CalledProcessError) as error:
        write(name, SET_UP, {"result": "failed", "why": str(error)}, {})
        return
    write(name, SET_UP, {"result": "passed", "why": ""}, versions)
    for check, row in checks(made, known):
        write(name, check, row, versions)


def write(name: str, check: str, row: Row, versions: dict[str, str]) -> None:
    """Write a row, with the versions of its stack, and say it."""
    print(f"{name}: {check}: {row['result']} {row.get('passed', '')} {row['why']}", flush=True)
    columns = ("result", "passed", "failed", "skipped", "why")
    whole = {"stack": name, "check": check} | {column: row.get(column, "") for column in columns}
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # stacks may be run side by side
        replace_rows(NAME, [whole], ("stack", "check"), of=versions)


def table(rows: list[Row]) -> str:
    """Return the table of docs/fits.md: a row per stack, its versions and what passed of it."""
    lines = [
        f"| | {' | '.join(PACKAGES)} | kernels | Trainer | TRL | tests |",
        "|---" * (len(PACKAGES) + 5) + "|",
    ]
    known = {row["stack"] for row in rows}
    for name in filter(known.__contains__, STACKS):  # the oldest first
        of_stack = {row["check"]: row for row in rows if row["stack"] == name}
        first = next(iter(of_stack.values()))
        runs = [mark(of_stack, kind) for kind in ("Trainer", "TRL")]
        versions = [first.get(package, "").partition("+")[0] for package in PACKAGES]
        tests = counted([of_stack[check] for check in TESTS if check in of_stack])
        cells = [name, *versions, first.get("backend", ""), *runs, tests]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def mark(of_stack: dict[str, Row], kind: str) -> str:
    """Return what the runs of a trainer ended in."""
    failed = [
        check
        for check in RUNS
        if check.startswith(kind) and of_stack.get(check, {}).get("result") != "passed"
    ]
    return "✓" if not failed else "failed: " + ", ".join(failed)


def counted(rows: list[Row]) -> str:
    """Return how many tests passed, and which groups of them did not."""
    passed = sum(int(row["passed"] or 0) for row in rows)
    failed = [
        f"{row['check']}: {row['failed'] or 'all'} failed"
        for row in rows
        if row["result"] != "passed"
    ]
    return "; ".join([f"{passed} passed", *failed])


def with_table(text: str) -> str:
    """Return the text of docs/fits.md with its table replaced."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "\n" + table(read_rows(RESULTS / NAME)) + "\n" + END + after


def main() -> None:
    """Run what is asked for, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=STACKS, default=list(STACKS), metavar="STACK")
    parser.add_argument(
        "--again", action="store_true", help="run what has a row of this commit, too"
    )
    parser.add_argument("--check", nargs="+", choices=[*RUNS, *TESTS], help="these alone")
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args()
    if not options.table:
        FOLDER.mkdir(parents=True, exist_ok=True)
        packages, copy = wheels(), copy_of_tests()
        for name in options.only:
            run_stack(name, packages, copy, options.again, options.check)
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
