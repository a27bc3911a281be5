"""Memory that processes share: an ``Arena`` lends regions of it to its owner, a ``Window`` lets another process see them.

A region is lent for exactly as long as a tensor over it exists, views and aliases included, so that nothing which anybody
still holds is ever written over. Regions that come back are lent again: a program that repeats itself stops asking for more.
"""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import os
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from duoka.workers.serialization import memory_file

__all__ = [
    "SharedArena",
    "Allocation",
    "TensorSpec",
    "Location",
    "Segment",
    "SharedView",
    "dense_stride",
    "lay_out",
    "tensor_at",
]

_ALIGNMENT = 64
_MAP_FIXED = 0x10
"""Of Linux, macOS and the BSDs alike; Python does not name it."""
_SEGMENT_BYTES = 1 << 26
"""The least size of a segment; the system gives it memory page by page, when it is written to."""


class Location(NamedTuple):
    """Where a region lies: in which segment, at which byte."""

    segment: int
    offset: int


class TensorSpec(NamedTuple):
    """One tensor inside a region: the byte it begins at, and how to read it."""

    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class Allocation(NamedTuple):
    """A lent region: ``base`` is its bytes, ``(nbytes,)``, and its hold on them."""

    place: Location
    base: torch.Tensor


class Segment(NamedTuple):
    """One shared mapping of an anonymous file."""

    fd: int
    mapping: mmap.mmap
    address: int


def dense_stride(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return the strides of a copy without gaps in the same order of dimensions: channels-last stays channels-last."""
    if tensor.is_contiguous():
        return tensor.stride()
    return torch.empty_like(tensor, device="meta").stride()


def lay_out(tensors: Iterable[torch.Tensor], start: int = 0) -> tuple[list[TensorSpec], int]:
    """Return where each tensor goes in one region, and the bytes that they need from its beginning on."""
    pieces, end = [], start
    for tensor in tensors:
        pieces.append(TensorSpec(end, tuple(tensor.shape), dense_stride(tensor), tensor.dtype))
        end += -(-tensor.numel() * tensor.dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
    return pieces, end


def tensor_at(base: torch.Tensor, piece: TensorSpec, start: int = 0) -> torch.Tensor:
    """Return the tensor that ``piece`` describes, over the memory of ``base``."""
    begin = start + piece.offset
    flat = base[begin : begin + math.prod(piece.shape) * piece.dtype.itemsize].view(piece.dtype)
    return flat.as_strided(piece.shape, piece.stride)


class SharedArena:
    """Lends regions of memory that other processes may map too; it grows by whole segments and never shrinks."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.segments: list[Segment] = []
        self._unused = 0  # bytes at the end of the last segment that were never lent
        self._free: dict[int, list[Location]] = {}
        self._returned: deque[tuple[int, Location]] = deque()

    def lend(self, nbytes: int) -> Allocation:
        """Return a region of at least ``nbytes``, whose base has exactly so many; contents are what was there."""
        size = _size_class(nbytes)
        self._take_back()
        free = self._free.get(size)
        place = free.pop() if free else self._cut(size)
        view = memoryview(self.segments[place.segment].mapping)[place.offset : place.offset + max(nbytes, 1)]
        with torch.inference_mode(False):
            base = torch.frombuffer(view, dtype=torch.uint8)
        weakref.finalize(view, self._returned.append, (size, place)).atexit = False
        return Allocation(place, base[:nbytes])

    def keep_from_children(self) -> None:
        """Let a forked child that writes here write to pages of its own, as it does to the rest of its parent's memory."""
        arenas = _kept_from_children()
        arenas.add(self)

    def find(self, tensor: torch.Tensor) -> Location | None:
        """Return where ``tensor`` begins, if it lies in this arena."""
        pointer = tensor.data_ptr()
        for index, segment in enumerate(self.segments):
            if 0 <= pointer - segment.address < len(segment.mapping):
                return Location(index, pointer - segment.address)
        return None

    def close(self) -> None:
        """Close the files; memory that tensors still hold stays theirs."""
        for segment in self.segments:
            os.close(segment.fd)
        self.segments.clear()
        self._free.clear()
        self._returned = deque()  # what is lent now comes back to the old one, and is forgotten with it
        self._unused = 0

    def _take_back(self) -> None:
        while self._returned:
            size, place = self._returned.popleft()
            self._free.setdefault(size, []).append(place)

    def _cut(self, size: int) -> Location:
        if self._unused < size:
            self._grow(max(_SEGMENT_BYTES, size))
        segment = len(self.segments) - 1
        offset = len(self.segments[segment].mapping) - self._unused
        self._unused -= size
        return Location(segment, offset)

    def _grow(self, nbytes: int) -> None:
        fd = memory_file(f"duoka-{self.name}")
        os.ftruncate(fd, nbytes)
        mapping = mmap.mmap(fd, nbytes)
        self.segments.append(Segment(fd, mapping, torch.frombuffer(mapping, dtype=torch.uint8).data_ptr()))
        self._unused = nbytes


@functools.cache
def _kept_from_children() -> weakref.WeakSet[SharedArena]:
    """Return the arenas whose pages become a forked child's own; the first call registers what makes them so."""
    arenas: weakref.WeakSet[SharedArena] = weakref.WeakSet()
    if not hasattr(os, "register_at_fork"):
        return arenas
    map_again = ctypes.CDLL(None, use_errno=True).mmap
    map_again.restype = ctypes.c_void_p
    map_again.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    allowed, how = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | _MAP_FIXED

    def in_child() -> None:
        for segment in [segment for arena in arenas for segment in arena.segments]:
            map_again(segment.address, len(segment.mapping), allowed, how, segment.fd, 0)
        arenas.clear()  # a child of this child inherits what was written here

    os.register_at_fork(after_in_child=in_child)
    return arenas


class SharedView:
    """What another process's arena looks like from here."""

    def __init__(self, *, is_private: bool = False) -> None:
        self._bases: list[torch.Tensor] = []
        self._mappings: list[mmap.mmap] = []
        self._access = mmap.ACCESS_COPY if is_private else mmap.ACCESS_WRITE

    def add(self, fd: int) -> None:
        """Map the arena's next segment, and close ``fd``. In a private window nobody's writes are seen outside."""
        try:
            mapping = mmap.mmap(fd, 0, access=self._access)
        finally:
            os.close(fd)
        self._mappings.append(mapping)
        self._bases.append(torch.frombuffer(mapping, dtype=torch.uint8))

    def refresh(self) -> None:
        """Undo what was written to a private window: the owner's values are seen again everywhere (Linux)."""
        for mapping in self._mappings:
            mapping.madvise(mmap.MADV_DONTNEED)

    def is_written_to(self) -> bool:
        """Whether something was written to a private window (Linux): the system counts such pages as anonymous."""
        addresses = {f"{base.data_ptr():x}" for base in self._bases}
        inside = False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            name, _, rest = line.partition(" ")
            if "-" in name:
                inside = name.partition("-")[0] in addresses
            elif inside and name == "Anonymous:" and rest.split()[0] != "0":
                return True
        return False

    def tensor(self, place: Location, piece: TensorSpec) -> torch.Tensor:
        """Return one tensor of a region, with a version counter of its own."""
        return tensor_at(self._bases[place.segment], piece, place.offset).data

    def tensors(self, place: Location, pieces: Sequence[TensorSpec]) -> list[torch.Tensor]:
        """Return the tensors of a region."""
        return [self.tensor(place, piece) for piece in pieces]


def _size_class(nbytes: int) -> int:
    """The bytes lent for so many: four sizes to each doubling, whole pages, so that little is wasted and much fits again."""
    pages = max(1, -(-nbytes // mmap.PAGESIZE))
    step = max(1, (1 << (pages.bit_length() - 1)) // 4)
    return -(-pages // step) * step * mmap.PAGESIZE
