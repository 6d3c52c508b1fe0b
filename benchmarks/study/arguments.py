"""What the commands of the study share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def chosen(
    parser: argparse.ArgumentParser, flag: str, given: str | None, known: Sequence[str]
) -> list[str]:
    """Return the names of a list with commas, or all that are known; an unknown one is an error."""
    names = list(known) if given is None else given.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        parser.error(f"{flag} {given}: {unknown[0]!r} is not one of {', '.join(known)}")
    return names
