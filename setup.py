"""Build entry point; everything declarative is in pyproject.toml."""

from setuptools import setup

setup()
