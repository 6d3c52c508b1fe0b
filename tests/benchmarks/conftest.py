"""What every test of benchmarks starts from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """Benchmarks set the number of threads; put it back."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
