"""Lists of tensors as a table on the device, so that one launch serves a whole list.

A launch gets two tensors of int64: the address of every operand of every tensor, and one row
(tensor, offset, size, aligned) per chunk. One program works on one chunk, block by block: it waits
for its row and for the addresses once, and not once for each block. A chunk is aligned if every
operand is, to 16 bytes: its blocks need no mask, and the compiler reads and writes them 128 bits at
a time. What is left of it, and all of a chunk that is not aligned, is masked, element by element.

Here too: what a list has to be for the kernels to take it, and how a kernel is launched.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from sap_fast.ops.triton import interpreted

#: What the kernels store, and what Triton calls it. They compute in fp32.
DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}

#: Elements of a chunk, as in csrc/cuda: its row is 32 bytes for 16,384 elements.
CHUNK = 16384

#: How every kernel is compiled. Without fusion a·b + c rounds twice, as the reference does; where
#: one rounding is meant the kernels say `fma`.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}

_ALIGNMENT = 16

#: Elements that are masked at a time: short code, and few registers.
TAIL = tl.constexpr(512)

_INTERPRETED = tl.constexpr(interpreted)


# ---- in kernels ----


@triton.jit
def load_chunk(
    chunks: tl.tensor, index: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Return tensor, offset, size and whether it is aligned of one chunk."""
    row = chunks + 4 * index.to(tl.int64)
    return tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3) != 0


@triton.jit
def load_address(
    addresses: tl.tensor,
    tensor: tl.tensor,
    OPERAND: tl.constexpr,
    OPERANDS: tl.constexpr,
    DTYPE: tl.constexpr,
) -> tl.tensor:
    """Return the address of one operand of a tensor, as a pointer to DTYPE."""
    return tl.load(addresses + tensor * OPERANDS + OPERAND).to(tl.pointer_type(DTYPE))


@triton.jit
def load_block(
    pointer: tl.tensor, size: tl.tensor, BLOCK: tl.constexpr, WHOLE: tl.constexpr
) -> tl.tensor:
    """Return BLOCK elements; if not WHOLE, zeros from the `size`-th on."""
    index = tl.arange(0, BLOCK)
    if WHOLE:
        # Pointers from a table bring no alignment of their own; an argument keeps no hint either.
        values = tl.load(tl.multiple_of(pointer + index, 16))
    else:
        values = tl.load(pointer + index, mask=index < size, other=0.0)
    return values


@triton.jit
def widen(values: tl.tensor) -> tl.tensor:
    """Return values in fp32, exactly."""
    if _INTERPRETED and values.dtype == tl.bfloat16:
        # Devices do so by themselves; Triton's interpreter loses subnormal numbers.
        bits = values.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        wide = bits.to(tl.float32, bitcast=True)
    else:
        wide = values.to(tl.float32)
    return wide


@triton.jit
def narrow(values: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """Round fp32 to DTYPE, to nearest even; DTYPE itself passes as it is."""
    if _INTERPRETED and DTYPE == tl.bfloat16 and values.dtype == tl.float32:
        # Devices round so by themselves; Triton's interpreter cuts the low bits off.
        bits = values.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(values != values, 0x7FC0, rounded)
        narrowed = rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        narrowed = values.to(DTYPE)
    return narrowed


@triton.jit
def store_block(
    pointer: tl.tensor,
    values: tl.tensor,
    size: tl.tensor,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
) -> None:
    """Store BLOCK elements, rounded to nearest even; if not WHOLE, the first `size`."""
    index = tl.arange(0, BLOCK)
    values = narrow(values, pointer.dtype.element_ty)
    if WHOLE:
        tl.store(tl.multiple_of(pointer + index, 16), values)
    else:
        tl.store(pointer + index, values, mask=index < size)


@triton.jit
def load_operands(
    addresses: tl.tensor, tensor: tl.tensor, offset: tl.tensor, DTYPES: tl.constexpr
) -> tl.tuple:
    """Return pointers to a chunk of each operand; DTYPES are what the operands store."""
    OPERANDS: tl.constexpr = len(DTYPES)
    pointers: tl.tuple = ()
    for operand in tl.static_range(OPERANDS):
        pointer = load_address(addresses, tensor, operand, OPERANDS, DTYPES[operand]) + offset
        pointers = pointers + (pointer,)  # noqa: RUF005 - Triton knows no starred elements
    return pointers


@triton.jit
def load_values(
    operands: tl.tuple,
    start: tl.tensor,
    size: tl.tensor,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
) -> tl.tuple:
    """Return BLOCK elements of each operand from `start` on, as they are stored."""
    return [load_block(pointer + start, size - start, BLOCK, WHOLE) for pointer in operands]


@triton.jit
def in_blocks(size: tl.tensor, aligned: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """Return how many elements of a chunk lie in blocks that need no mask."""
    return tl.where(aligned, size - size % BLOCK, 0)


@triton.jit
def transform(
    compute: tl.constexpr,
    operands: tl.tuple,
    coefficients: tl.tuple,
    size: tl.tensor,
    aligned: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Run compute(operands, coefficients) on a chunk, block by block.

    `compute` takes the elements as they are stored and returns, as a tuple, those of the first
    operands: operands that are written come before those that are only read.
    """
    unmasked = in_blocks(size, aligned, BLOCK)
    for start in range(0, unmasked, BLOCK):
        _transform_block(compute, operands, coefficients, start, size, BLOCK, True)
    for start in range(unmasked, size, TAIL):
        _transform_block(compute, operands, coefficients, start, size, TAIL, False)


@triton.jit
def _transform_block(
    compute: tl.constexpr,
    operands: tl.tuple,
    coefficients: tl.tuple,
    start: tl.tensor,
    size: tl.tensor,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
) -> None:
    results = compute(load_values(operands, start, size, BLOCK, WHOLE), coefficients)
    # The last one first: perturb and restore take 64 and 70 registers, the other way round 80.
    for index in tl.static_range(len(results) - 1, -1, -1):
        store_block(operands[index] + start, results[index], size - start, BLOCK, WHOLE)


# ---- what a list has to be ----


class Operand(NamedTuple):
    """One of the lists that an operation takes; entries may be None where all are optional."""

    name: str
    tensors: Sequence[Tensor | None]
    written: bool
    #: None: the dtype of the first list's tensor.
    dtype: torch.dtype | None = None


def check_lists(operands: Sequence[Operand]) -> None:
    """Check that the kernels can take these lists; the first one is the measure of the others.

    Raises:
        ValueError: for lists of different lengths, or tensors of different shapes.
        NotImplementedError: for what the kernels do not support: dtypes, layouts, several devices.
    """
    first = operands[0]
    for operand in operands[1:]:
        if len(operand.tensors) != len(first.tensors):
            raise ValueError(
                f"{first.name} has {len(first.tensors)} tensors, "
                f"{operand.name} has {len(operand.tensors)}"
            )
        for index, (tensor, model) in enumerate(zip(operand.tensors, first.tensors, strict=True)):
            assert model is not None
            if tensor is not None and tensor.shape != model.shape:
                raise ValueError(
                    f"{operand.name}[{index}] has shape {tuple(tensor.shape)}, "
                    f"{first.name}[{index}] has {tuple(model.shape)}"
                )
    device = None
    for operand in operands:
        for index, (tensor, model) in enumerate(zip(operand.tensors, first.tensors, strict=True)):
            if tensor is not None and model is not None:
                device = device or model.device
                wanted = operand.dtype or model.dtype
                # Of a list of hundreds the host feels every microsecond: the usual case comes
                # first, and names are made for errors alone.
                usual = tensor.dtype == wanted in DTYPES and tensor.device == device
                if not (usual and tensor.is_contiguous() and model.is_contiguous()):
                    _check_supported(f"{operand.name}[{index}]", tensor, wanted, model, device)


def _check_supported(
    name: str, tensor: Tensor, dtype: torch.dtype, model: Tensor, device: torch.device
) -> None:
    if tensor.dtype not in DTYPES:
        raise NotImplementedError(
            f"{name} has dtype {tensor.dtype}; the Triton kernels take "
            f"{', '.join(str(known) for known in DTYPES)}"
        )
    if tensor.dtype != dtype:
        raise NotImplementedError(f"{name} has dtype {tensor.dtype}; the kernel takes {dtype}")
    if tensor.device != device:
        raise NotImplementedError(f"{name} is on {tensor.device}, others are on {device}")
    if tensor.is_contiguous() and model.is_contiguous():
        return
    strides, wanted = _strides(tensor), _strides(model)
    if strides != wanted:
        raise NotImplementedError(
            f"{name} has strides {tensor.stride()}, the tensor it goes with has {model.stride()}; "
            "the Triton kernels take tensors of equal strides"
        )
    expected = 1
    for stride, size in sorted(strides):
        if stride != expected:
            raise NotImplementedError(
                f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}; the Triton "
                "kernels take tensors without gaps"
            )
        expected *= size


def _strides(tensor: Tensor) -> list[tuple[int, int]]:
    """Return (stride, size) of the dimensions whose stride means something."""
    if tensor.numel() == 0:
        return []
    return [
        (stride, size)
        for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
        if size > 1
    ]


def check_overlaps(operands: Sequence[Operand]) -> None:
    """Check that memory that is written is nobody else's: programs run in no order.

    Raises:
        ValueError: naming two tensors without gaps that share memory, of which one is written.
    """
    extents = sorted(
        (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, operand.written, operand.name, index)
        for operand in operands
        for index, tensor in enumerate(operand.tensors)
        if tensor is not None and tensor.numel() > 0
    )
    # Of what lies before, what ends last: of everything, and of what is written.
    farthest = farthest_written = (0, "", 0)
    for start, end, written, list_name, index in extents:
        other_end, other_name, other_index = farthest if written else farthest_written
        if start < other_end:
            raise ValueError(
                f"{list_name}[{index}] shares memory with {other_name}[{other_index}]; each tensor "
                "may be given once, and one that is written only to itself"
            )
        if end > farthest[0]:
            farthest = (end, list_name, index)
        if written and end > farthest_written[0]:
            farthest_written = (end, list_name, index)


def check_same(name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    """Check dtype and device of a tensor that is not in a list.

    Raises:
        NotImplementedError: naming it.
    """
    if tensor.dtype != dtype:
        raise NotImplementedError(
            f"{name} has dtype {tensor.dtype}; the Triton kernel takes {dtype}"
        )
    if tensor.device != device:
        raise NotImplementedError(f"{name} is on {tensor.device}; the kernel runs on {device}")


def scalar(
    name: str, value: Tensor, device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the value of a tensor of one element on `device`, without waiting for it.

    Raises:
        ValueError: naming it, if it is not one floating-point number.
    """
    if value.numel() != 1 or not value.is_floating_point():
        raise ValueError(
            f"{name} has shape {tuple(value.shape)} and dtype {value.dtype}; a floating-point "
            "tensor of one element is needed"
        )
    if value.device.type == "cpu" and device.type != "cpu":
        return torch.full((), float(value), dtype=dtype, device=device)
    return value.detach().reshape(()).to(device, dtype, non_blocking=True)


# ---- the table ----


class Plan(NamedTuple):
    """The chunks of tensors of given sizes."""

    #: (chunk_count, 4) int64: tensor, offset, size, aligned.
    chunks: Tensor
    #: (tensors + 1,) int64: where the chunks of each tensor begin, and the end.
    starts: Tensor
    chunk_count: int


@dataclass
class Table:
    """What one launch works on: tensors of the same dtypes, on one device."""

    #: Of every operand that the tensors have.
    dtypes: tuple[tl.dtype, ...]
    #: Positions of these tensors in the lists.
    members: list[int]
    #: (tensors, operands) int64.
    addresses: Tensor
    plan: Plan
    written: list[Tensor]


def make_tables(operands: Sequence[Operand], chunk_size: int) -> list[Table]:
    """Return one table per combination of dtypes, for lists that `check_lists` took.

    Operands that are None have no address: combinations differ in which these are, too.
    """
    groups: dict[tuple[torch.dtype | None, ...], list[int]] = {}
    for index, row in enumerate(zip(*(operand.tensors for operand in operands), strict=True)):
        kind = tuple(None if tensor is None else tensor.dtype for tensor in row)
        groups.setdefault(kind, []).append(index)
    return [_make_table(operands, members, chunk_size) for members in groups.values()]


def _make_table(operands: Sequence[Operand], members: list[int], chunk_size: int) -> Table:
    addresses, sizes, aligned, written = [], [], [], []
    given = [operand.tensors[members[0]] for operand in operands]
    for index in members:
        together = 0
        for operand in operands:
            tensor = operand.tensors[index]
            if tensor is not None:
                addresses.append(tensor.data_ptr())
                together |= addresses[-1]
                if operand.written:
                    written.append(tensor)
        aligned.append(together % _ALIGNMENT == 0)
        sizes.append(_first(operands, index).numel())
    first = _first(operands, members[0])
    return Table(
        dtypes=tuple(DTYPES[tensor.dtype] for tensor in given if tensor is not None),
        members=members,
        addresses=address_table(addresses, first.device).view(len(members), -1),
        plan=_cached(_chunk_plan, first.device, tuple(sizes), tuple(aligned), chunk_size),
        written=written,
    )


def _first(operands: Sequence[Operand], index: int) -> Tensor:
    tensor = operands[0].tensors[index]
    assert tensor is not None
    return tensor


def address_table(addresses: Sequence[int], device: torch.device) -> Tensor:
    """Return addresses as an int64 tensor on the device."""
    return _cached(_addresses, device, tuple(addresses))


# The keys of these caches are all that the tensors hold: a gradient that was allocated anew, or a
# parameter whose `.data` was exchanged, is another key. So is another stream, which would not wait
# for the copy. What is cached for a list is small: 8 bytes per operand, 32 per chunk.


@functools.lru_cache(maxsize=128)
def _addresses(device: torch.device, stream: int, addresses: tuple[int, ...]) -> Tensor:
    return _copy_to(device, torch.tensor(addresses, dtype=torch.int64))


@functools.lru_cache(maxsize=32)
def _chunk_plan(
    device: torch.device,
    stream: int,
    sizes: tuple[int, ...],
    aligned: tuple[bool, ...],
    chunk_size: int,
) -> Plan:
    chunks, starts = plan_chunks(sizes, aligned, chunk_size)
    both = _copy_to(device, torch.cat([chunks.flatten(), starts]))
    return Plan(both[: chunks.numel()].view(-1, 4), both[chunks.numel() :], len(chunks))


def plan_chunks(
    sizes: Sequence[int], aligned: Sequence[bool], chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Return `Plan.chunks` and `Plan.starts` on the CPU; an empty tensor has no chunk."""
    size = torch.tensor(sizes, dtype=torch.int64)
    counts = (size + chunk_size - 1) // chunk_size
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    tensor = torch.arange(len(size)).repeat_interleave(counts)
    offset = (torch.arange(len(tensor)) - starts[tensor]) * chunk_size
    length = (size[tensor] - offset).clamp(max=chunk_size)
    known = torch.tensor(aligned, dtype=torch.int64)[tensor]
    return torch.stack([tensor, offset, length, known], dim=1), starts


#: Host and device tensors that CUDA graphs read again when they are replayed.
_captured: list[object] = []


def _cached(make: Any, device: torch.device, *key: Any) -> Any:
    if device.type != "cuda":
        return make(device, 0, *key)
    if torch.cuda.is_current_stream_capturing():
        # Filled when the graph is replayed, not now: of no use to anyone else.
        made = make.__wrapped__(device, 0, *key)
        _captured.append(made)
        return made
    return make(device, torch.cuda.current_stream(device).cuda_stream, *key)


def _copy_to(device: torch.device, host: Tensor) -> Tensor:
    """Copy to the device without waiting for it."""
    if device.type != "cuda":
        return host
    pinned = host.pin_memory()
    if torch.cuda.is_current_stream_capturing():
        _captured.append(pinned)
    return pinned.to(device, non_blocking=True)


# ---- launches ----


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make the device the current one: Triton launches there."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _run(
    kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], constants: Mapping[str, Any]
) -> None:
    kernel[grid](*arguments, **constants, **OPTIONS)


#: What runs a launch; `ahead_of_time` puts in its place what only compiles it.
launcher = _run


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, written: Sequence[Tensor], **constants: Any
) -> None:
    """Launch a kernel and count up the versions of what it writes; a grid of none does nothing."""
    if 0 not in grid:
        launcher(kernel, grid, arguments, constants)
        increment_version(written)
