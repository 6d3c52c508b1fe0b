"""Lays the Triton kernels out as the kernel hub wants them: one build for every torch.

    python hub/build.py              # into hub/: torch-ext/, for kernel-builder, and build/
    python hub/build.py --out DIR    # a whole kernel repository in another folder

A kernel of the hub is loaded from any path, and several versions of it may be loaded side by side:
so its modules import each other by relative names, and nothing of sap-fast.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import tomllib
from pathlib import Path

from sap_fast.ops.schema import digest

HUB = Path(__file__).resolve().parent
OPS = HUB.parent / "sap_fast" / "ops"
#: The modules of sap_fast.ops that the kernels need, by the names that they have here.
MODULES = {
    "adamw": OPS / "triton" / "adamw.py",
    "interrupts": OPS / "interrupts.py",
    "perturb": OPS / "triton" / "perturb.py",
    "probe": OPS / "triton" / "probe.py",
    "reference": OPS / "reference.py",
    "table": OPS / "triton" / "table.py",
}
#: Every backend that Triton compiles for loads the same files.
VARIANT = "torch-universal"


def relative(source: str) -> str:
    """Return the source of a module with relative names in the place of sap_fast's.

    Raises:
        ValueError: if a name of sap_fast is imported that is not of MODULES.
    """
    source = re.sub(r"^from sap_fast\.ops\.triton import", "from . import", source, flags=re.M)
    names = "|".join(MODULES)
    source = re.sub(
        rf"^from sap_fast\.ops(?:\.triton)?\.({names}) import",
        r"from .\1 import",
        source,
        flags=re.M,
    )
    left = re.search(r"^(?:from|import) sap_fast.*$", source, flags=re.M)
    if left is not None:
        raise ValueError(
            f"{left[0]!r}: the kernels of the hub may import {', '.join(MODULES)} alone"
        )
    return source


def write_package(folder: Path) -> None:
    """Write the modules beside `__init__.py`, which is there or is copied."""
    folder.mkdir(parents=True, exist_ok=True)
    start = HUB / "torch-ext" / "sap_fast" / "__init__.py"
    if start.parent.resolve() != folder.resolve():
        shutil.copy(start, folder)
    for name, path in MODULES.items():
        (folder / f"{name}.py").write_text(relative(path.read_text("utf-8")), "utf-8")
    text = (
        f'"""What tells the operations from those of other versions."""\n\nDIGEST = "{digest()}"\n'
    )
    (folder / "schemas.py").write_text(text, "utf-8")


def build(out: Path) -> Path:
    """Write a kernel repository to `out` and return the folder of its one build."""
    general = tomllib.loads((HUB / "build.toml").read_text("utf-8"))["general"]
    variant = out / "build" / VARIANT
    shutil.rmtree(variant, ignore_errors=True)
    write_package(out / "torch-ext" / "sap_fast")
    write_package(variant)
    for name in ("build.toml", "README.md"):
        if out.resolve() != HUB:
            shutil.copy(HUB / name, out)
    metadata = {
        "id": f"_sap_fast_{digest()}",
        "name": general["name"],
        "version": general["version"],
        "license": general["license"],
        "python-depends": [],
        "backend": {"type": general["backends"][0]},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", "utf-8")
    return variant


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HUB)
    print(build(parser.parse_args().out))
