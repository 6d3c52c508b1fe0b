"""The `sap-fast` command line; every command is a thin layer over the package's own functions."""

from __future__ import annotations


def main() -> None:
    """Run `sap-fast`; bad input ends with one clear line and exit status 2."""
    from sap_fast.cli.app import run

    run()
