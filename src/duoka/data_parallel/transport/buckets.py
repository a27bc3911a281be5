"""Buckets: flat blocks of many tensors each, moved by few large transfers; and their checksums."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from duoka.data_parallel.tensor_layout import TensorSpec, pack_layout, tensor_at
from duoka.utils.torch_private import copy_in_place

_BYTES = 25 << 20
"""Size limit, as in DistributedDataParallel: enough for full link speed, and for overlap."""
_FIRST_BYTES = 1 << 20
_CHECKSUM_CHUNK = 1 << 20


class Bucket(NamedTuple):
    """Layout of some tensors, by index, in one flat block."""

    specs: dict[int, TensorSpec]
    nbytes: int
    dtype: torch.dtype
    """Type in which gradients are summed."""


def value_buckets(tensors: Sequence[torch.Tensor], groups: Iterable[Sequence[int]]) -> list[Bucket]:
    """Return buckets for values; each holds tensors of one group, of any types."""
    return [_bucket(tensors, part, torch.uint8) for group in groups for part in _chunks(tensors, group, _BYTES)]


def gradient_buckets(parameters: Sequence[torch.Tensor]) -> list[Bucket]:
    """Return buckets for gradients, of one dtype each, about in the order of a backward."""
    by_dtype: dict[torch.dtype, list[int]] = {}
    for index in reversed(range(len(parameters))):
        if parameters[index].requires_grad:
            by_dtype.setdefault(parameters[index].dtype, []).append(index)
    return [
        _bucket(parameters, part, dtype.to_real())
        for dtype, group in by_dtype.items()
        for part in _chunks(parameters, group, _FIRST_BYTES)
    ]


def _chunks(tensors: Sequence[torch.Tensor], group: Sequence[int], limit: int) -> Iterable[list[int]]:
    """Cut a group into chunks of at most ``limit`` bytes, and of ``_BYTES`` after the first."""
    chunk: list[int] = []
    size = 0
    for index in group:
        nbytes = tensors[index].numel() * tensors[index].element_size()
        if chunk and size + nbytes > limit:
            yield chunk
            chunk, size, limit = [], 0, _BYTES
        chunk.append(index)
        size += nbytes
    if chunk:
        yield chunk


def _bucket(tensors: Sequence[torch.Tensor], indices: Sequence[int], dtype: torch.dtype) -> Bucket:
    specs, nbytes = pack_layout(tensors[index] for index in indices)
    return Bucket(dict(zip(indices, specs, strict=True)), nbytes, dtype)


def allocate_bytes(nbytes: int, device: torch.device) -> torch.Tensor:
    """Return zeros, ``(nbytes,)``; an ordinary tensor in inference mode too."""
    with torch.inference_mode(False):
        return torch.zeros(nbytes, dtype=torch.uint8, device=device)


def pack_bucket(bucket: Bucket, tensors: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Return the bucket's bytes, filled from its tensors."""
    base = allocate_bytes(bucket.nbytes, device)
    slots = [tensor_at(base, spec) for spec in bucket.specs.values()]
    with torch.no_grad():
        copy_in_place(slots, [tensors[index].detach() for index in bucket.specs])
    return base


class BucketChecksum:
    """Computes a 64-bit checksum of a bucket on its device: each 32-bit word times its own odd 64-bit number.

    So order counts, and one changed word always changes it; several do with near certainty. (32-bit products would not
    do: all signs changed at once leave their sum as it was, if as many products grow as shrink.)
    """

    def __init__(self, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(-(2**62), 2**62, (_CHECKSUM_CHUNK,), generator=generator)
        self._factors = (drawn * 2 + 1).to(device)

    def __call__(self, base: torch.Tensor) -> torch.Tensor:
        """Return the checksum, ``()``."""
        total = torch.zeros((), dtype=torch.int64, device=base.device)
        for part in torch.split(base.view(torch.int32), _CHECKSUM_CHUNK):
            total = total * 1_000_003 + (part * self._factors[: len(part)]).sum()
        return total
