"""What the README shows runs as it stands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import typer

from sap_fast.cli.app import app
from tests.tiny import problem

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_both_python_examples_run() -> None:
    case = problem()
    names = {
        "model": case.model,
        "batch": case.batch,
        "pairs": {"chosen": case.chosen, "rejected": case.rejected},
    }
    blending, sap = blocks("python")
    for example in (blending, sap):
        before = [parameter.detach().clone() for parameter in case.trained]
        exec(example, names)
        for old, new in zip(before, case.trained, strict=True):
            assert not old.equal(new)
    assert names["optimizer"].metrics.rho_agreement > 0.99


def test_every_command_and_option_shown_exists() -> None:
    commands = typer.main.get_command(app).commands
    shown = [line for block in blocks("bash") for line in block.splitlines() if "sap-fast" in line]
    assert {shlex.split(line)[1] for line in shown} == set(commands)
    for line in shown:
        _, name, *arguments = shlex.split(line)
        known = {option for parameter in commands[name].params for option in parameter.opts}
        given = {argument for argument in arguments if argument.startswith("--")}
        assert given <= known, (name, given - known)


def test_the_tests_that_the_table_of_stacks_names_exist() -> None:
    folder = Path(__file__).parent
    table = (folder.parent / "docs" / "stacks.md").read_text()
    source = "".join(path.read_text() for path in folder.rglob("*.py"))
    names = re.findall(r"`(test_\w+)(…?)`", table)
    assert len(names) > 20
    for name, shortened in names:
        assert f"def {name}{'' if shortened else '('}" in source, name
    for target in re.findall(r"\]\(([^)#]+)\)", table):
        assert (folder.parent / "docs" / target).exists(), target
