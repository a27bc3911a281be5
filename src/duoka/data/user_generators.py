"""Generators that the user's samplers, data sets, transforms and collations hold as attributes."""

import pickle
import random
from typing import Any, TypeAlias

import numpy as np
import torch

from duoka.data.rng import Rng
from duoka.utils.rng_state import hash_seed

Generator: TypeAlias = torch.Generator | random.Random | np.random.Generator | np.random.RandomState
_WRAPPED = ("dataset", "datasets", "transform", "transforms", "target_transform")


def generators_of(*owners: object) -> list[Rng]:
    """Return the generators that ``owners``, and what they wrap, hold as attributes, each once."""
    values = [value for owner in with_wrapped(*owners) for value in getattr(owner, "__dict__", {}).values()]
    found = {id(value): value for value in values if isinstance(value, Generator)}
    return [_UserGenerator(generator) for generator in found.values()]


def with_wrapped(*owners: object) -> list[object]:
    """Return ``owners`` and what they wrap, each once.

    Wrapped are the data sets inside a data set (``Subset``, ``ConcatDataset``, ``ChainDataset``), the transforms of
    either, and the steps of such a transform.
    """
    found: dict[int, object] = {}
    waiting = list(owners)
    while waiting:
        owner = waiting.pop(0)
        if id(owner) in found:
            continue
        found[id(owner)] = owner
        attributes = getattr(owner, "__dict__", {})
        for inner in (attributes[name] for name in _WRAPPED if name in attributes):
            waiting += inner if isinstance(inner, (list, tuple)) else [inner]
    return list(found.values())


class _UserGenerator(Rng):
    """A generator object of the user's; each seed is combined with its first state, so that the user's seed matters."""

    def __init__(self, generator: Generator) -> None:
        self._generator: Any = generator
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
        if isinstance(self._generator, np.random.Generator):
            return self._generator.bit_generator.state
        return self._generator.getstate() if isinstance(self._generator, random.Random) else self._generator.get_state()

    def set(self, state: Any) -> None:
        if isinstance(self._generator, np.random.Generator):
            self._generator.bit_generator.state = state
        elif isinstance(self._generator, random.Random):
            self._generator.setstate(state)
        else:
            self._generator.set_state(state)
