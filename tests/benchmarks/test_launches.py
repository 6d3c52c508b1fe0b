"""The operations of a pass, counted on tiny models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import launches
from tests.benchmarks.helpers import SURROUNDINGS, read


def test_views_and_allocations_are_no_operations() -> None:
    with launches.Operations() as found:
        tensor = torch.empty(4, 4)
        tensor.fill_(1.0)
        assert (tensor.T[0] + 1).detach().shape == (4,)
    assert (found.count, found.dequantized) == (2, 0)


def test_a_pair_of_probe_passes_takes_fewer_operations_than_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launches, "SETUPS", ("lora",))
    launches.main(["--layers", "4", "--output", str(tmp_path)])
    rows = read(tmp_path / "launches.csv")
    assert [row["pass"] for row in rows] == ["safety", "probe", "task", "update"] * 2
    assert all(set(row) >= SURROUNDINGS for row in rows)
    two, paired = (
        {row["pass"]: int(row["operations"]) for row in rows if row["probe_passes"] == passes}
        for passes in ("two", "paired")
    )
    assert paired["probe"] < 0.75 * two["probe"]
    assert {k: v for k, v in two.items() if k != "probe"} == {
        k: v for k, v in paired.items() if k != "probe"
    }
    assert "lora" in capsys.readouterr().out


@pytest.mark.slow
def test_a_four_bit_base_is_dequantized_half_as_often() -> None:
    pytest.importorskip("bitsandbytes")
    two, paired = (
        {row["pass"]: row for row in launches.measure("lora, 4-bit base", passes, 4)}
        for passes in ("two", "paired")
    )
    assert paired["probe"]["dequantizations"] * 2 == two["probe"]["dequantizations"] > 0
