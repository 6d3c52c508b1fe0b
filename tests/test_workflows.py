"""Workflows, issue forms and papers: they name what there is."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from sap_fast import __version__

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text("utf-8"))


def commands(workflow: Any) -> list[str]:
    return [
        step["run"]
        for job in workflow["jobs"].values()
        for step in job.get("steps", [])
        if "run" in step
    ]


def test_there_is_a_workflow_for_each_purpose() -> None:
    names = {path.stem for path in WORKFLOWS}
    assert names == {"tests", "wheels", "docs", "release", "gpu"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_jobs_end_have_few_rights_and_name_what_is_there(path: Path) -> None:
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert "uses" in job or job["timeout-minutes"] <= 90
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, re.M))
    included = workflow["jobs"].get("tests", {}).get("strategy", {}).get("matrix", {})
    named = {row["target"] for row in included.get("include", [])}
    for command in commands(workflow):
        named |= set(re.findall(r"^make ([\w-]+)", command, re.M))
        for file in re.findall(r"\b[\w/]+\.py\b", command):
            assert (ROOT / file).exists(), file
    assert named <= targets, named - targets


def test_nothing_is_published_but_by_the_trusted_workflow() -> None:
    release = read(ROOT / ".github" / "workflows" / "release.yml")
    publish = release["jobs"]["publish"]
    assert publish["permissions"] == {"id-token": "write"} and publish["environment"] == "pypi"
    assert release["jobs"]["distributions"]["uses"] == "./.github/workflows/wheels.yml"
    for path in WORKFLOWS:
        text = path.read_text("utf-8")
        assert "secrets." not in text and "password" not in text
        assert ("gh-action-pypi-publish" in text) == (path.stem == "release")


def test_wheels_are_built_for_every_python_that_the_package_supports() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    oldest = int(re.search(r">=3\.(\d+)", settings["project"]["requires-python"])[1])  # type: ignore[index]
    built = settings["tool"]["cibuildwheel"]["build"].split()
    assert built[0] == f"cp3{oldest}-*"
    assert built == [f"cp3{oldest + step}-*" for step in range(len(built))]


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms_are_forms(path: Path) -> None:
    form = read(path)
    if path.stem == "config":
        return
    assert form["name"] and form["description"]
    identifiers = [item["id"] for item in form["body"]]
    assert len(set(identifiers)) == len(identifiers)
    assert all(item["attributes"]["label"] for item in form["body"])


def test_the_citation_is_of_this_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    citation = read(ROOT / "CITATION.cff")
    assert citation["version"] == __version__ and citation["license"] == project["license"]


@pytest.mark.skipif(shutil.which("actionlint") is None, reason="needs actionlint on the PATH")
def test_actionlint_finds_nothing() -> None:
    done = subprocess.run(["actionlint"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
