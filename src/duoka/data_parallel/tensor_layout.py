"""Layout of tensors in a flat block of memory: where each one begins, and how to read it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

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
    specs = [TensorSpec(0, tuple(tensor.shape), dense_stride(tensor), tensor.dtype) for tensor in tensors]
    return repack_layout(specs, start)


def repack_layout(specs: Iterable[TensorSpec], start: int = 0) -> tuple[list[TensorSpec], int]:
    """Return the same specs, one after the other from byte ``start``, and the end in bytes."""
    packed, end = [], start
    for spec in specs:
        packed.append(spec._replace(offset=end))
        end += -(-math.prod(spec.shape) * spec.dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
    return packed, end


def tensor_at(base: torch.Tensor, spec: TensorSpec, start: int = 0) -> torch.Tensor:
    """Return the tensor that ``spec`` describes, over the memory of ``base`` from byte ``start``."""
    begin = start + spec.offset
    flat = base[begin : begin + math.prod(spec.shape) * spec.dtype.itemsize].view(spec.dtype)
    return flat.as_strided(spec.shape, spec.stride)


def copy_to_layout(
    base: torch.Tensor, specs: Sequence[TensorSpec], tensors: Iterable[torch.Tensor], *, non_blocking: bool = False
) -> None:
    """Copy each tensor to its place in ``base``."""
    with torch.no_grad():
        for spec, tensor in zip(specs, tensors, strict=True):
            tensor_at(base, spec).copy_(tensor, non_blocking=non_blocking)
