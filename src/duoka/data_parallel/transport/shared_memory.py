"""Shared memory: a ``SharedArena`` allocates blocks, a ``SharedView`` maps another process's arena.

A block stays allocated for as long as a tensor over it exists, views and aliases included. The arena
reuses freed blocks: a training loop soon allocates nothing new.
"""

import contextlib
import ctypes
import functools
import mmap
import os
import weakref
from collections import deque
from pathlib import Path
from typing import NamedTuple

import torch

from duoka.data_parallel.tensor_layout import Allocation, Location
from duoka.data_parallel.transport.base import ModelMemory
from duoka.workers.resource_limits import explain_resource_errors
from duoka.workers.serialization import memory_file

_MAP_FIXED = 0x10
"""``MAP_FIXED`` of Linux, macOS and the BSDs; Python's ``mmap`` does not define it."""
_SEGMENT_BYTES = 1 << 26
"""Minimum size of a segment; the system provides its pages when they are first written."""


class Segment(NamedTuple):
    """One shared mapping of an anonymous file."""

    fd: int
    mapping: mmap.mmap
    address: int


class SharedArena:
    """Allocates blocks that other processes may map; it grows by segments and never shrinks."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.segments: list[Segment] = []
        self._unused = 0
        """Bytes at the end of the last segment that were never allocated."""
        self._free: dict[int, list[Location]] = {}
        self._returned: deque[tuple[int, Location]] = deque()

    def allocate(self, nbytes: int) -> Allocation:
        """Return a block whose base has exactly ``nbytes`` uninitialized bytes."""
        size = _size_class(nbytes)
        while self._returned:
            freed, place = self._returned.popleft()
            self._free.setdefault(freed, []).append(place)
        free = self._free.get(size)
        location = free.pop() if free else self._extend(size)
        mapping = self.segments[location.segment].mapping
        view = memoryview(mapping)[location.offset : location.offset + max(nbytes, 1)]
        with torch.inference_mode(False):
            base = torch.frombuffer(view, dtype=torch.uint8)
        weakref.finalize(view, self._returned.append, (size, location)).atexit = False
        return Allocation(location, base[:nbytes])

    def find(self, tensor: torch.Tensor) -> Location | None:
        """Return where ``tensor`` begins, if it lies in this arena."""
        pointer = tensor.data_ptr()
        for index, segment in enumerate(self.segments):
            if 0 <= pointer - segment.address < len(segment.mapping):
                return Location(index, pointer - segment.address)
        return None

    def close(self) -> None:
        """Close the files; tensors keep the memory that they use."""
        for segment in self.segments:
            os.close(segment.fd)
        self.segments.clear()
        self._free.clear()
        self._returned = deque()  # blocks in use now return to the old queue, which nothing reads
        self._unused = 0

    def _extend(self, size: int) -> Location:
        if self._unused < size:
            nbytes = max(_SEGMENT_BYTES, size)
            with explain_resource_errors("share memory with worker processes"), contextlib.ExitStack() as on_failure:
                fd = memory_file(f"duoka-{self.name}")
                on_failure.callback(os.close, fd)
                os.ftruncate(fd, nbytes)
                mapping = mmap.mmap(fd, nbytes)
                on_failure.pop_all()
            self.segments.append(Segment(fd, mapping, torch.frombuffer(mapping, dtype=torch.uint8).data_ptr()))
            self._unused = nbytes
        segment = len(self.segments) - 1
        offset = len(self.segments[segment].mapping) - self._unused
        self._unused -= size
        return Location(segment, offset)


@functools.cache
def isolated_arenas() -> weakref.WeakSet[SharedArena]:
    """Return the arenas where a forked child gets copy-on-write pages, as in the rest of its parent's memory.

    The first call registers the fork handler.
    """
    arenas: weakref.WeakSet[SharedArena] = weakref.WeakSet()
    remap = ctypes.CDLL(None, use_errno=True).mmap
    remap.restype = ctypes.c_void_p
    remap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | _MAP_FIXED

    def in_child() -> None:
        for segment in [segment for arena in arenas for segment in arena.segments]:
            remap(segment.address, len(segment.mapping), protection, flags, segment.fd, 0)
        arenas.clear()  # a child of this child inherits what this child wrote

    os.register_at_fork(after_in_child=in_child)
    return arenas


class SharedView(ModelMemory):
    """Another process's arena, mapped into this process."""

    def __init__(self, *, is_private: bool = False) -> None:
        """Create an empty view; other processes do not see writes to a private one."""
        super().__init__([])
        self._mappings: list[mmap.mmap] = []
        self._access = mmap.ACCESS_COPY if is_private else mmap.ACCESS_WRITE

    def map_segment(self, fd: int) -> None:
        """Map the arena's next segment, and close ``fd``."""
        try:
            with explain_resource_errors("share memory with worker processes"):
                mapping = mmap.mmap(fd, 0, access=self._access)
        finally:
            os.close(fd)
        self._mappings.append(mapping)
        self.bases.append(torch.frombuffer(mapping, dtype=torch.uint8))

    def discard_writes(self) -> None:
        """Undo writes to a private view, so that it shows the other process's values (Linux)."""
        for mapping in self._mappings:
            mapping.madvise(mmap.MADV_DONTNEED)

    def is_written_to(self) -> bool:
        """Return whether a private view was written to (Linux counts such pages as anonymous)."""
        addresses = {f"{base.data_ptr():x}" for base in self.bases}
        inside = False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            name, _, rest = line.partition(" ")
            if "-" in name:
                inside = name.partition("-")[0] in addresses
            elif inside and name == "Anonymous:" and rest.split()[0] != "0":
                return True
        return False


def _size_class(nbytes: int) -> int:
    """Return the block size for ``nbytes``: whole pages, in four classes per doubling."""
    pages = max(1, -(-nbytes // mmap.PAGESIZE))
    step = max(1, (1 << (pages.bit_length() - 1)) // 4)
    return -(-pages // step) * step * mmap.PAGESIZE
