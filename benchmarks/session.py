"""A terminal session on a real model, as docs/how-to/first-hour.md shows it.

Starts from an empty folder with the aligned SmolLM2 as `chat-model` and GSM8K problems as the task,
and runs one command after the other, from looking at the rows to a merged model. What each of them
printed last goes to results/session.txt and into the page, so that nothing there is typed in by
hand. Interrupted, it goes on with the command where it stopped.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import assets
from benchmarks.alignment import aligned_smollm2, write_rows
from benchmarks.provenance import RESULTS, ROOT, provenance

PAGE = ROOT / "docs" / "how-to" / "first-hour.md"

#: GSM8K problems.
TRAINED, HELD_OUT = slice(0, 80), slice(80, 100)

_TRAINING = "--learning-rate 1e-3 --max-length 128 --log-every 1"


@dataclass(frozen=True)
class Command:
    """A command of the session.

    Attributes:
        line: As it is typed.
        shown: How many of the last lines that it prints are kept.
    """

    line: str
    shown: int

    @property
    def name(self) -> str:
        """The subcommand."""
        return self.line.split()[1]


COMMANDS = (
    Command("sap-fast inspect --model chat-model --task rows.jsonl --rows 1", 40),
    Command("sap-fast pairs --model chat-model --limit 36 --output pairs.jsonl", 2),
    Command(
        "sap-fast finetune --model chat-model --task rows.jsonl --safety pairs.jsonl "
        f"--output tuned --max-steps 8 {_TRAINING}",
        2,
    ),
    Command("sap-fast evaluate --model tuned --task held-out.jsonl --limit 36", 14),
    Command("sap-fast merge --model tuned --output merged --dtype bf16 --gguf q8_0", 1),
    Command(
        "sap-fast compare --model chat-model --task rows.jsonl --held-out held-out.jsonl "
        f"--output compared --limit 24 --max-steps 8 {_TRAINING}",
        21,
    ),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the session, or what is left of it.

    Args:
        arguments: of the command line; `sys.argv` by default.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.session", description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "session")
    parser.add_argument("--page", action="store_true", help="only write the page again")
    options = parser.parse_args(arguments)
    text = RESULTS / "session.txt"
    if not options.page:
        work, printed = options.folder / "work", options.folder / "printed"
        prepare(work)
        printed.mkdir(exist_ok=True)
        for number, command in enumerate(COMMANDS):
            path = printed / f"{number}-{command.name}.txt"
            if not path.exists():
                print(f"$ {command.line}", flush=True)
                path.write_text(run(command, work), encoding="utf-8")
        blocks = [
            block(command, (printed / f"{number}-{command.name}.txt").read_text(encoding="utf-8"))
            for number, command in enumerate(COMMANDS)
        ]
        header = "".join(f"# {name}: {value}\n" for name, value in provenance().items())
        text.write_text("\n".join([header, *blocks]), encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(shown_in(page, blocks_of(text.read_text(encoding="utf-8"))), encoding="utf-8")


def prepare(work: Path) -> None:
    """Put the model and the rows into the folder, unless they are there."""
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "chat-model").exists():
        (work / "chat-model").symlink_to(aligned_smollm2())
        rows = assets.gsm8k_rows()
        write_rows(work / "rows.jsonl", rows[TRAINED])
        write_rows(work / "held-out.jsonl", rows[HELD_OUT])


def run(command: Command, work: Path) -> str:
    """Run a command in a terminal of 80 columns, and return what it printed.

    Raises:
        SystemExit: it failed; what it printed is shown.
    """
    words = shlex.split(command.line)
    environment = os.environ | {
        "COLUMNS": "80",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
    }
    ran = subprocess.run(
        [sys.executable, "-m", "sap_fast.cli", *words[1:]],
        cwd=work,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if ran.returncode != 0:
        sys.exit(f"$ {command.line}\n{ran.stdout}")
    return ran.stdout


def block(command: Command, printed: str) -> str:
    """Return a command and the last lines that it printed, as the page shows them."""
    lines = [line.rstrip() for line in printed.splitlines() if line.strip()][-command.shown :]
    return "\n".join([f"$ {command.line}", *lines]) + "\n"


def blocks_of(text: str) -> dict[str, str]:
    """Return the blocks of a session by their commands."""
    found = re.findall(r"^\$ (.*)\n((?:(?!\$ |\n).*\n)*)", text, flags=re.MULTILINE)
    return {line: f"$ {line}\n{output}" for line, output in found}


def shown_in(page: str, blocks: Mapping[str, str]) -> str:
    """Return a page with what the commands of its console blocks printed.

    Raises:
        KeyError: the page has a command that the session has not.
    """

    def printed(found: re.Match[str]) -> str:
        return f"```console\n{blocks[found[1]]}```"

    return re.sub(r"```console\n\$ (.*)\n(?:.*\n)*?```", printed, page)


if __name__ == "__main__":
    main()
