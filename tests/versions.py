"""Which versions of other packages the tests run on."""

from __future__ import annotations

from importlib.metadata import version

from packaging.version import Version


def older(package: str, than: str) -> bool:
    """Whether the version of a package that is installed is before another one."""
    return Version(version(package)) < Version(than)
