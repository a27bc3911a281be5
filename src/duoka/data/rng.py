"""Randomness of its own for the data: seeds that are a function of where, and generators borrowed and given back.

Samplers, augmentations and loaders draw from the process's global generators. They shall draw the same on every rank, and
the user's own draws shall not notice.
"""

from __future__ import annotations

import contextlib
import hashlib
import pickle
import random
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch.utils.data import get_worker_info

from duoka.data.global_rng import GLOBAL, RngState, WatchedRngState

__all__ = ["IsolatedRng", "RandomUseDetector", "generators_of", "hash_seed", "derive_seed"]

T = TypeVar("T")
Generator: TypeAlias = torch.Generator | random.Random | np.random.Generator | np.random.RandomState
_BUILT_FROM = ("dataset", "datasets", "transform", "transforms", "target_transform")
_MASK = 0xFFFF_FFFF_FFFF_FFFF


def hash_seed(*parts: object) -> int:
    """Return a 64-bit seed that is a function of ``parts`` (numbers and words) on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def derive_seed(stream: int, number: int) -> int:
    """Return seed ``number`` of the ``stream``: splitmix64 (Steele, Lea and Flood 2014), cheap enough for each sample."""
    z = (stream + (number + 1) * 0x9E37_79B9_7F4A_7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58_476D_1CE4_E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D0_49BB_1331_11EB) & _MASK
    return z ^ (z >> 31)


class IsolatedRng(contextlib.AbstractContextManager[None]):
    """States of ``streams`` that are in force inside ``with`` blocks only; each block continues where the last one ended.

    They start from ``seed``; outside the blocks the generators are as they were.
    """

    def __init__(self, seed: int, streams: Sequence[RngState]) -> None:
        self._seed = seed
        self._generators = streams
        self._inside: list[Any] | None = None
        self._outside: list[Any] = []

    def __enter__(self) -> None:
        self._outside = [stream.get() for stream in self._generators]
        if self._inside is None:
            for stream in self._generators:
                stream.seed(self._seed)
        else:
            self._set(self._inside)

    def __exit__(self, *_: object) -> None:
        self._inside = [stream.get() for stream in self._generators]
        self._set(self._outside)

    def _set(self, states: list[Any]) -> None:
        for stream, state in zip(self._generators, states, strict=True):
            stream.set(state)


class RandomUseDetector:
    """Runs something that may draw random numbers, from seeds, without the cost of seeding what it does not draw from.

    Seeding every generator for every sample takes longer than loading many a sample. So a generator is only watched until
    something was drawn from it; then it is rewound, the work is done once more, and from then on it is seeded. In the main
    process all generators are given back as they were found; a worker process has no other use for them.
    """

    def __init__(self, held: Sequence[WatchedRngState] = ()) -> None:
        """Watch the process's global generators and ``held``, those of the user's own objects."""
        self.used: list[WatchedRngState] = []
        """The generators that were drawn from: what is to be seeded."""
        self._unused = [*GLOBAL, *held]

    def run(self, work: Callable[[], T]) -> T:
        """Return ``work()``, which seeds ``used``; it is called again where it drew from another generator."""
        found = [] if get_worker_info() is not None else [(stream, stream.get()) for stream in self.used]
        try:
            while True:
                marks = [(stream, stream.mark()) for stream in self._unused]
                moved = []
                try:
                    result = work()
                finally:
                    for stream, mark in marks:
                        if stream.moved(mark):
                            moved.append((stream, mark))
                    found += self._rewind(moved)
                if not moved:
                    return result
        finally:
            for stream, state in found:
                stream.set(state)

    def seed(self, seed: int) -> None:
        """Seed the generators that were drawn from so far."""
        for stream in self.used:
            stream.seed(seed)

    def _rewind(self, moved: list[tuple[WatchedRngState, Any]]) -> list[tuple[WatchedRngState, Any]]:
        """Rewind what was drawn from, and count it as used; return the states that were found."""
        for stream, mark in moved:
            stream.rewind(mark)
            self._unused.remove(stream)
            self.used.append(stream)
        return [(stream, stream.get()) for stream, _ in moved]


def generators_of(*owners: object) -> list[WatchedRngState]:
    """Return the generators that ``owners`` hold as attributes, each once.

    So do those that they are built from: the data sets of a data set (``Subset``, ``ConcatDataset``), the transforms of
    either, and the steps of such a transform.
    """
    found: dict[int, Generator] = {}
    seen: dict[int, object] = {}
    waiting = list(owners)
    while waiting:
        owner = waiting.pop(0)
        if id(owner) in seen:
            continue
        seen[id(owner)] = owner
        attributes = getattr(owner, "__dict__", {})
        found |= {id(value): value for value in attributes.values() if isinstance(value, Generator)}
        for inner in (attributes[name] for name in _BUILT_FROM if name in attributes):
            waiting += inner if isinstance(inner, (list, tuple)) else [inner]
    return [UserGenerator(generator) for generator in found.values()]


class UserGenerator:
    """A generator of the user's own; it starts from a seed mixed with its first state, so that seeding it keeps a meaning."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        first = generator.initial_seed() if isinstance(generator, torch.Generator) else pickle.dumps(self.get())
        self._origin = hash_seed("held", first)

    def seed(self, seed: int) -> None:
        generator, seed = self._generator, hash_seed(seed, self._origin)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(seed)
        elif isinstance(generator, np.random.Generator):
            bits: Any = type(generator.bit_generator)
            generator.bit_generator.state = bits(seed).state
        else:
            generator.seed(seed & 0xFFFF_FFFF)

    def get(self) -> Any:
        if isinstance(self._generator, random.Random):
            return self._generator.getstate()
        if isinstance(self._generator, np.random.Generator):
            return self._generator.bit_generator.state
        return self._generator.get_state()

    def set(self, state: Any) -> None:
        if isinstance(self._generator, random.Random):
            self._generator.setstate(state)
        elif isinstance(self._generator, np.random.Generator):
            self._generator.bit_generator.state = state
        else:
            self._generator.set_state(state)

    def mark(self) -> bytes:
        return pickle.dumps(self.get())

    def moved(self, mark: bytes) -> bool:
        return self.mark() != mark

    def rewind(self, mark: bytes) -> None:
        self.set(pickle.loads(mark))
