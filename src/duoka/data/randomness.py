"""Randomness of its own for the data: seeds that are a function of where, and generator states swapped in and out.

Samplers, augmentations and loaders draw from the process's global generators (torch's, ``random``'s, NumPy's and, once it
is initialised, the accelerator's). They shall draw the same on every rank, and the user's own draws shall not notice.
"""

from __future__ import annotations

import hashlib
import pickle
import random
from collections.abc import Iterable
from typing import Any, TypeAlias

import numpy as np
import torch

__all__ = ["PrivateRandomness", "capture", "draws_since", "generators_of", "mixed", "nth_seed", "restore", "seed_all"]

_MASK = 0xFFFF_FFFF_FFFF_FFFF
State: TypeAlias = tuple[Any, ...]
Holder: TypeAlias = "torch.Generator | random.Random | np.random.Generator | np.random.RandomState"


def mixed(*parts: object) -> int:
    """Return a 64-bit seed that is a function of ``parts`` (numbers and words) on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def nth_seed(stream: int, number: int) -> int:
    """Return seed ``number`` of the ``stream``: splitmix64 (Steele, Lea and Flood 2014), cheap enough for each sample."""
    z = (stream + (number + 1) * 0x9E37_79B9_7F4A_7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58_476D_1CE4_E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D0_49BB_1331_11EB) & _MASK
    return z ^ (z >> 31)


def seed_all(seed: int) -> None:
    """Seed the process's global generators; far cheaper than ``torch.manual_seed``, which imports and asks every backend."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFF_FFFF)  # noqa: NPY002 - the global generator is the one that users draw from
    if (device := _device_module()) is not None:
        device.manual_seed(seed)


def capture() -> State:
    """Return the states of the process's global generators."""
    device = _device_module()
    return (
        torch.default_generator.get_state(),
        random.getstate(),
        np.random.get_state(legacy=False),  # noqa: NPY002
        None if device is None else device.get_rng_state(),
    )


def restore(state: State) -> None:
    """Give the process's global generators the states that ``capture`` returned."""
    torch.default_generator.set_state(state[0])
    random.setstate(state[1])
    np.random.set_state(state[2])  # noqa: NPY002
    if state[3] is not None and (device := _device_module()) is not None:
        device.set_rng_state(state[3])


def draws_since(seed: int) -> bool:
    """Whether anything was drawn since ``seed_all(seed)``; the generators are elsewhere afterwards."""
    now = _next_numbers()
    seed_all(seed)
    return now != _next_numbers()


def generators_of(*owners: object) -> list[Holder]:
    """Return the generators that ``owners`` (samplers, loaders) hold as attributes, each once."""
    found: dict[int, Holder] = {}
    for owner in owners:
        for value in getattr(owner, "__dict__", {}).values():
            if isinstance(value, (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)):
                found[id(value)] = value
    return list(found.values())


class PrivateRandomness:
    """Generator states that are in force inside ``with`` blocks only; each block continues where the one before ended.

    The global generators start from ``seed``. A user's own generators in ``holders`` start from ``seed`` mixed with the
    state they were given, so that seeding them still chooses the order. Outside the blocks all are as they were.
    """

    def __init__(self, seed: int, holders: Iterable[Holder] = ()) -> None:
        self._seed = seed
        self._holders = list(holders)
        self._inside: tuple[State, list[Any]] | None = None
        self._outside: tuple[State, list[Any]] | None = None

    def __enter__(self) -> None:
        self._outside = self._states()
        if self._inside is not None:
            self._become(self._inside)
            return
        seed_all(self._seed)
        for holder in self._holders:
            _seed_holder(holder, mixed(self._seed, _origin(holder)))

    def __exit__(self, *_: object) -> None:
        self._inside = self._states()
        assert self._outside is not None
        self._become(self._outside)

    def _states(self) -> tuple[State, list[Any]]:
        return capture(), [_get_holder(holder) for holder in self._holders]

    def _become(self, states: tuple[State, list[Any]]) -> None:
        restore(states[0])
        for holder, state in zip(self._holders, states[1], strict=True):
            _set_holder(holder, state)


def _next_numbers() -> tuple[float, float, float]:
    return torch.rand(()).item(), random.random(), np.random.random()  # noqa: NPY002


def _device_module() -> Any:
    """Return torch's module of the accelerator if this process has initialised it, else ``None``."""
    device = torch.accelerator.current_accelerator()
    if device is None:
        return None
    module = torch.get_device_module(device)
    return module if getattr(module, "is_initialized", bool)() else None


def _origin(holder: Holder) -> str:
    """Return what tells one seeding of ``holder`` from another."""
    if isinstance(holder, torch.Generator):
        return str(holder.initial_seed())
    return hashlib.blake2b(pickle.dumps(_get_holder(holder)), digest_size=8).hexdigest()


def _get_holder(holder: Holder) -> Any:
    if isinstance(holder, random.Random):
        return holder.getstate()
    if isinstance(holder, np.random.Generator):
        return holder.bit_generator.state
    return holder.get_state()


def _set_holder(holder: Holder, state: Any) -> None:
    if isinstance(holder, random.Random):
        holder.setstate(state)
    elif isinstance(holder, np.random.Generator):
        holder.bit_generator.state = state
    else:
        holder.set_state(state)


def _seed_holder(holder: Holder, seed: int) -> None:
    if isinstance(holder, torch.Generator):
        holder.manual_seed(seed)
    elif isinstance(holder, random.Random):
        holder.seed(seed)
    elif isinstance(holder, np.random.Generator):
        holder.bit_generator.state = type(holder.bit_generator)(seed).state
    else:
        holder.seed(seed & 0xFFFF_FFFF)
