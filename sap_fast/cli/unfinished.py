"""Work that is not finished: what a failed run leaves behind, and with which settings it began."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sap_fast.cli import ranks
from sap_fast.cli.console import UserError


@contextmanager
def removed_on_failure(folder: Path, *, keep: Callable[[], bool]) -> Iterator[None]:
    """Removes what a failed run made: `folder` and the folders around it, unless `keep()`."""
    made = [path for path in (folder, *folder.parents) if not path.exists() and ranks.is_first()]
    try:
        yield
    except BaseException:
        if made and not keep():
            shutil.rmtree(folder, ignore_errors=True)
            for around in made[1:]:
                # Another run may have begun in it meanwhile.
                with suppress(OSError):
                    around.rmdir()
        raise


def settings_of(record: Path) -> dict[str, Any]:
    """Returns the settings in a `run.json`.

    Raises:
        UserError: if there are none.
    """
    try:
        return dict(json.loads(record.read_text(encoding="utf-8"))["settings"])
    except (ValueError, TypeError, LookupError) as error:
        raise UserError(
            f"{record} is damaged; remove the folder {record.parent} to start over"
        ) from error


def refuse_other_settings(work: Path, now: dict[str, Any]) -> None:
    """Checks that what is unfinished in a folder was begun with the settings of now.

    Args:
        work: Folder with a `run.json`.
        now: Settings by name; `output` may differ.

    Raises:
        UserError: The settings differ, or those of another version are saved.
    """
    begun = settings_of(work / "run.json")
    over = "remove that folder to start over"
    if begun.keys() != now.keys():
        raise UserError(f"{work} was begun with another version of sap-fast; {over}")
    changed = [name for name in now if name != "output" and begun[name] != now[name]]
    if changed:
        what = ", ".join(f"{name}: {begun[name]} then, {now[name]} now" for name in changed)
        raise UserError(
            f"{work} was begun with other settings ({what}); give the same to go on, or {over}"
        )
