"""Many tensors in a few flat buckets, so that they travel in a few large pieces; and a number that says what is in one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from duoka.data_parallel.transport.shared_memory import Location, TensorSpec, lay_out, tensor_at

__all__ = ["Bucket", "BucketLayout", "BucketChecksum", "allocate", "gradient_buckets", "pack", "value_buckets"]

_BYTES = 25 << 20
"""As DistributedDataParallel's: large enough for a link's full speed, small enough to begin early and to borrow."""
_FIRST_BYTES = 1 << 20
_HASHED_AT_ONCE = 1 << 20


class Bucket(NamedTuple):
    """Where each of some numbered tensors lies in one flat piece of memory."""

    pieces: dict[int, TensorSpec]
    nbytes: int
    dtype: torch.dtype
    """What its bytes are added as, where it holds gradients."""


def value_buckets(tensors: Sequence[torch.Tensor], groups: Iterable[Sequence[int]]) -> list[Bucket]:
    """Return buckets for values: each holds tensors of one group, of any types."""
    return [_bucket(tensors, part, torch.uint8) for group in groups for part in _parts(tensors, group, _BYTES)]


def gradient_buckets(parameters: Sequence[nn.Parameter]) -> list[Bucket]:
    """Return buckets for gradients, of one type each, in about the order in which a backward finishes them."""
    wanted = [index for index in reversed(range(len(parameters))) if parameters[index].requires_grad]
    kinds: dict[torch.dtype, list[int]] = {}
    for index in wanted:
        kinds.setdefault(parameters[index].dtype, []).append(index)
    return [
        _bucket(parameters, part, dtype.to_real())
        for dtype, group in kinds.items()
        for part in _parts(parameters, group, _FIRST_BYTES)
    ]


def _parts(tensors: Sequence[torch.Tensor], group: Sequence[int], limit: int) -> Iterable[list[int]]:
    part: list[int] = []
    size = 0
    for index in group:
        nbytes = tensors[index].numel() * tensors[index].element_size()
        if part and size + nbytes > limit:
            yield part
            part, size, limit = [], 0, _BYTES
        part.append(index)
        size += nbytes
    if part:
        yield part


def _bucket(tensors: Sequence[torch.Tensor], part: Sequence[int], dtype: torch.dtype) -> Bucket:
    pieces, nbytes = lay_out(tensors[index] for index in part)
    return Bucket(dict(zip(part, pieces, strict=True)), nbytes, dtype)


def allocate(nbytes: int, device: torch.device) -> torch.Tensor:
    """Return bytes that are all zero, ``(nbytes,)``, an ordinary tensor also where inference mode holds."""
    with torch.inference_mode(False):
        return torch.zeros(nbytes, dtype=torch.uint8, device=device)


def pack(bucket: Bucket, tensors: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Return the bucket's bytes, filled with those of its tensors."""
    base = allocate(bucket.nbytes, device)
    slots = [tensor_at(base, piece) for piece in bucket.pieces.values()]
    with torch.no_grad():
        torch._foreach_copy_(slots, [tensors[index].detach() for index in bucket.pieces])
    return base


class BucketChecksum:
    """Makes a number of a bucket, on its device, that changes with any one element and, all but surely, with any more.

    Each 32 bits are multiplied by an odd number of their own, which loses nothing, so that order counts as well.
    """

    def __init__(self, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(-(2**30), 2**30, (_HASHED_AT_ONCE,), dtype=torch.int32, generator=generator)
        self._factors = (drawn * 2 + 1).to(device)

    def __call__(self, base: torch.Tensor) -> torch.Tensor:
        """Return the number, ``()``."""
        total = torch.zeros((), dtype=torch.int64, device=base.device)
        for part in torch.split(base.view(torch.int32), _HASHED_AT_ONCE):
            total = total * 1_000_003 + (part * self._factors[: len(part)]).sum(dtype=torch.int64)
        return total


class BucketLayout:
    """A helper's memory for one model's parameters and buffers, bucket by bucket."""

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        self.bases = [allocate(size, device) for size in sizes]

    def tensor(self, place: Location, piece: TensorSpec) -> torch.Tensor:
        """Return one tensor of a bucket, with a version counter of its own."""
        return tensor_at(self.bases[place.segment], piece, place.offset).data

    def refresh(self) -> None:
        """Do nothing: what the owner has changed is sent."""

    def is_written_to(self) -> bool:
        """Return no: what a model writes to its parameters here is overwritten by what its owner's part writes there."""
        return False
