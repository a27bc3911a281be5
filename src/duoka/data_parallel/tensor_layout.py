"""Layout of tensors in a flat block of memory: where each one begins, and how to read it."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar

import torch

_ALIGNMENT = 64


class Location(NamedTuple):
    """Start of a block: its segment (or bucket) and the byte offset there."""

    segment: int
    offset: int


class TensorSpec(NamedTuple):
    """One tensor inside a block: its first byte, shape, strides and dtype."""

    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


SpecT = TypeVar("SpecT", TensorSpec, TensorSpec | None)


class Allocation(NamedTuple):
    """An allocated block; ``base`` is its bytes, ``(nbytes,)``, and keeps the block allocated."""

    location: Location
    base: torch.Tensor


def dense_stride(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return the strides of a copy without gaps; channels-last stays channels-last."""
    if tensor.is_contiguous():
        return tensor.stride()
    return torch.empty_like(tensor, device="meta").stride()


def pack_layout(tensors: Iterable[torch.Tensor], start: int = 0) -> tuple[list[TensorSpec], int]:
    """Return the specs of tensors that follow each other from byte ``start``, and the end in bytes."""
    return repack_layout([_spec_of(tensor) for tensor in tensors], start)


def pack_present(tensors: Iterable[torch.Tensor | None], start: int = 0) -> tuple[list[TensorSpec | None], int]:
    """Do the same as ``pack_layout``, with ``None`` for ``None``."""
    return repack_layout([None if tensor is None else _spec_of(tensor) for tensor in tensors], start)


def repack_layout(specs: Iterable[SpecT], start: int = 0) -> tuple[list[SpecT], int]:
    """Return the same specs, one after the other from byte ``start``, and the end in bytes."""
    packed: list[SpecT] = []
    end = start
    for spec in specs:
        if spec is not None:
            spec = spec._replace(offset=end)
            end += -(-math.prod(spec.shape) * spec.dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        packed.append(spec)
    return packed, end


def _spec_of(tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(0, tuple(tensor.shape), dense_stride(tensor), tensor.dtype)


def tensor_at(base: torch.Tensor, spec: TensorSpec, start: int = 0) -> torch.Tensor:
    """Return the tensor that ``spec`` describes, over the memory of ``base`` from byte ``start``."""
    begin = start + spec.offset
    flat = base[begin : begin + math.prod(spec.shape) * spec.dtype.itemsize].view(spec.dtype)
    return flat.as_strided(spec.shape, spec.stride)


def copy_to_layout(
    base: torch.Tensor,
    specs: Sequence[TensorSpec | None],
    tensors: Iterable[torch.Tensor | None],
    *,
    non_blocking: bool = False,
) -> None:
    """Copy each tensor that is not ``None`` to its place in ``base``."""
    with torch.no_grad():
        for spec, tensor in zip(specs, tensors, strict=True):
            if spec is not None and tensor is not None:
                tensor_at(base, spec).copy_(tensor, non_blocking=non_blocking)
