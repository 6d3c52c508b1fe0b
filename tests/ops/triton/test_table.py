"""Lists of tensors as a table for one launch: groups, chunks, and what is kept of them."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import triton.language as tl

from sap_fast.ops.triton import perturb, table


def test_tensors_are_grouped_by_dtypes_and_by_what_is_missing() -> None:
    one, half = torch.zeros(4), torch.zeros(4, dtype=torch.bfloat16)
    params = [one.clone(), half.clone(), one.clone(), one.clone(), half.clone()]
    directions = [one.clone(), half.clone(), None, one.clone(), half.clone()]
    operands = [
        table.Operand("params", params, written=True),
        table.Operand("directions", directions, written=False),
    ]
    made = table.make_tables(operands, 1024)
    assert [found.members for found in made] == [[0, 3], [1, 4], [2]]
    kinds = [(tl.float32,) * 2, (tl.bfloat16,) * 2, (tl.float32,)]
    assert [found.dtypes for found in made] == kinds
    for found in made:
        pairs = [(params[index], directions[index]) for index in found.members]
        addresses = [[x.data_ptr() for x in pair if x is not None] for pair in pairs]
        assert found.addresses.tolist() == addresses
        assert all(a is b for a, (b, _) in zip(found.written, pairs, strict=True))


def test_a_table_serves_one_stream_and_a_captured_graph_keeps_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    capturing, stream = False, 1
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=stream)
    )
    monkeypatch.setattr(table, "_captured", [])
    make = functools.lru_cache(lambda *key: [key])
    device = torch.device("cuda", 0)

    def cached() -> object:
        return table._cached(make, device, (8, 16))

    first = cached()
    assert cached() is first and first == [(device, 1, (8, 16))]
    stream = 2
    assert cached() is not first
    stream, capturing = 1, True
    captured = cached()
    # Filled when the graph is replayed, so others must not find it, and it must live on.
    assert captured is not first and table._captured == [captured]
    capturing = False
    assert cached() is first


def test_the_plan_of_a_tensor_beyond_32_bits() -> None:
    sizes = [5, 0, 2**33 + 3]
    chunks, starts = table.plan_chunks(sizes, [True, True, True], 2**20)
    assert starts.tolist() == [0, 1, 1, 1 + 2**13 + 1]
    assert chunks[0].tolist() == [0, 0, 5, 1]
    assert chunks[-2].tolist() == [2, 2**33 - 2**20, 2**20, 1]
    assert chunks[-1].tolist() == [2, 2**33, 3, 1]
    assert chunks[:, 2].sum() == sum(sizes)


def test_chunks_are_aligned_as_their_tensors_are() -> None:
    chunks, _ = table.plan_chunks([64, 64], [False, True], 32)
    assert chunks[:, 3].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("odd", [None, 0, 1])
def test_one_operand_that_is_not_aligned_is_enough_to_mask(odd: int | None) -> None:
    tensors = [torch.zeros(perturb.BLOCK + 1)[i == odd :][: perturb.BLOCK] for i in range(2)]
    operands = [table.Operand(str(i), [tensor], written=True) for i, tensor in enumerate(tensors)]
    (made,) = table.make_tables(operands, perturb.BLOCK)
    assert made.plan.chunks.tolist() == [[0, 0, perturb.BLOCK, int(odd is None)]]
