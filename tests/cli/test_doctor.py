"""`sap-fast doctor`."""

from __future__ import annotations

import torch

from sap_fast.cli.console import console
from tests.cli.terminal import Terminal


def test_doctor_names_versions_backends_and_what_survives_rounding(terminal: Terminal) -> None:
    terminal.monkeypatch.setattr(console, "width", 120)
    assert terminal.run("doctor") == 0
    printed = terminal.shown
    assert torch.__version__ in printed
    for operation in ("perturb_swap_", "probe_project_", "adamw_blend_", "reference"):
        assert operation in printed
    arguments = ["doctor", "--model", str(terminal.chat_model), "--full", "--precision", "bf16"]
    assert terminal.run(*arguments) == 0
    printed = terminal.shown
    assert "lost to rounding" in printed and "100" in printed


def test_doctor_says_why_nothing_runs(terminal: Terminal) -> None:
    terminal.monkeypatch.setattr(console, "width", 120)
    for name, value, message in (
        ("SAP_FAST_BACKEND", "cuda", "choose one of"),
        ("SAP_FAST_BACKEND", "reference", "asked for by SAP_FAST_BACKEND"),
    ):
        terminal.monkeypatch.setenv(name, value)
        assert terminal.run("doctor") == 0
        assert message in terminal.shown
