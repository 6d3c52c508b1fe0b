"""What a result depends on besides its settings: the device and the versions."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

import torch

from sap_fast import __version__

PACKAGES = (
    *("torch", "triton", "transformers", "peft", "accelerate", "trl", "datasets"),
    *("bitsandbytes", "torchao", "liger-kernel"),
)


def environment() -> dict[str, str]:
    """Returns the device, the number of CPU threads, and the version of every package installed."""
    found = {
        "device": device_name(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "sap-fast": __version__,
    }
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def device_name() -> str:
    """Returns the name of the accelerator, or else of the processor."""
    if torch.accelerator.is_available():
        return torch.get_device_module().get_device_name()
    return processor_name()


def processor_name() -> str:
    """Returns the name of the processor and the vector instructions that PyTorch uses on it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
