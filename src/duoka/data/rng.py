"""Random number generators during data loading: isolation from the user's draws, and a seed for each sample.

Samplers, augmentations and loaders draw from the process's global generators. Here they draw the same numbers on every
rank, and the states that the user's code sees do not change. Only public interfaces of the generators are used.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import pickle
import random
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch

T = TypeVar("T")
Generator: TypeAlias = torch.Generator | random.Random | np.random.Generator | np.random.RandomState
_WRAPPED = ("dataset", "datasets", "transform", "transforms", "target_transform")
_MASK = 0xFFFF_FFFF_FFFF_FFFF
_PROBE_SEED = 0x6A09_E667


def hash_seed(*parts: object) -> int:
    """Return a 64-bit seed that is a hash of ``parts`` (numbers and strings), the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def derive_seed(stream: int, index: int) -> int:
    """Return seed ``index`` of ``stream``: splitmix64 (Steele, Lea and Flood 2014), cheap enough for each sample."""
    z = (stream + (index + 1) * 0x9E37_79B9_7F4A_7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58_476D_1CE4_E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D0_49BB_1331_11EB) & _MASK
    return z ^ (z >> 31)


class Rng:
    """A generator with public state; subclasses may detect draws at a lower cost than comparing states."""

    def seed(self, seed: int) -> None:
        """Restart from ``seed``."""
        raise NotImplementedError

    def get(self) -> Any:
        """Return the state."""
        raise NotImplementedError

    def set(self, state: Any) -> None:
        """Restore a state that ``get`` returned."""
        raise NotImplementedError

    def isolate(self) -> Any:
        """Return what ``restore`` needs to undo all draws from here on."""
        return self.get()

    def restore(self, state: Any) -> None:
        """Restore what ``isolate`` returned."""
        self.set(state)

    def arm(self) -> Any:
        """Return what ``was_drawn_from`` needs; called after ``isolate``, so the state may be changed."""
        return self.get()

    def was_drawn_from(self, armed: Any) -> bool:
        """Whether the state has changed since ``arm``; the check itself may draw."""
        state = self.get()
        if isinstance(state, torch.Tensor):
            return not torch.equal(state, armed)
        return pickle.dumps(state) != pickle.dumps(armed)


class _TorchRng(Rng):
    """torch's CPU generator, used directly because ``torch.manual_seed`` takes 100 times as long."""

    def seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    def get(self) -> Any:
        return torch.default_generator.get_state()

    def set(self, state: Any) -> None:
        torch.default_generator.set_state(state)

    def arm(self) -> float:
        torch.default_generator.manual_seed(_PROBE_SEED)
        return _torch_probe()[1]

    def was_drawn_from(self, armed: float) -> bool:
        return _torch_probe()[0].uniform_().item() != armed


@functools.cache
def _torch_probe() -> tuple[torch.Tensor, float]:
    """Return a place for a draw, and the first draw after ``arm``."""
    place = torch.empty(1, dtype=torch.float64, device="cpu")
    return place, place.uniform_(generator=torch.Generator().manual_seed(_PROBE_SEED)).item()


class _PythonRng(Rng):
    """The generator of the module ``random``, whose state is a tuple of 625 numbers that ``getstate`` builds each time.

    So the state of the last batch is used again, if the next number is the one that follows it. A draw by the data set
    is detected in the same way, from a known state.
    """

    def __init__(self) -> None:
        self._state: Any = None
        self._following = 0

    def seed(self, seed: int) -> None:
        random.seed(seed)

    def get(self) -> Any:
        return random.getstate()

    def set(self, state: Any) -> None:
        random.setstate(state)

    def isolate(self) -> Any:
        if self._state is None or self._state[2] is not None:  # using up a spare Gaussian number changes nothing else
            self._keep(random.getstate())
        elif random.getrandbits(64) != self._following:
            self._keep(_before_draw(random.getstate()))
        return self._state

    def _keep(self, state: Any) -> None:
        copy = random.Random()
        copy.setstate(state)
        self._state, self._following = state, copy.getrandbits(64)

    def arm(self) -> int:
        state, following = _python_probe()
        random.setstate(state)
        return following

    def was_drawn_from(self, armed: int) -> bool:
        return random.getrandbits(64) != armed


@functools.cache
def _python_probe() -> tuple[Any, int]:
    probe = random.Random(_PROBE_SEED)
    return probe.getstate(), probe.getrandbits(64)


def _before_draw(state: Any) -> Any:
    """Return the state before 64 bits were drawn; in 1 of 624 cases it is lost, and 64 bits are left out."""
    version, (*words, place), gauss = state
    return version, (*words, place - 2 if place >= 2 else place), gauss


class _NumpyRng(Rng):
    """NumPy's global generator.

    Reading its state takes longer than loading many a sample. So another bit generator is set during loading, which is
    cheap, but makes NumPy forget the spare Gaussian number of its legacy functions. Where there is one, or the user's
    code draws between batches, the whole state is read and restored. Batches 1, 2, 4, 8 and so on look for that.
    """

    def __init__(self) -> None:
        self._private = np.random.MT19937(_PROBE_SEED)
        self._batches = 0
        self._last: bytes | None = None
        self._is_exact = False

    def seed(self, seed: int) -> None:
        bits: Any = np.random.get_bit_generator()  # type: ignore[attr-defined]
        if isinstance(bits, np.random.MT19937):
            np.random.seed(seed & 0xFFFF_FFFF)  # noqa: NPY002 - the global generator is what users draw from
        else:
            self.set({**type(bits)(seed).state, "has_gauss": 0, "gauss": 0.0})

    def get(self) -> Any:
        return np.random.get_state(legacy=False)  # noqa: NPY002

    def set(self, state: Any) -> None:
        np.random.set_state(state)  # noqa: NPY002

    def isolate(self) -> Any:
        bits, state = np.random.get_bit_generator(), None  # type: ignore[attr-defined]
        self._batches += 1
        if self._is_exact or self._batches & (self._batches - 1) == 0:
            state = self.get()
            found = pickle.dumps(state)
            self._is_exact = self._is_exact or bool(state["has_gauss"]) or self._last not in (None, found)
            self._last = found
        np.random.set_bit_generator(self._private)  # type: ignore[attr-defined]
        return bits, state

    def restore(self, state: Any) -> None:
        np.random.set_bit_generator(state[0])  # type: ignore[attr-defined]
        if state[1] is not None:
            self.set(state[1])

    def arm(self) -> float:
        np.random.seed(_PROBE_SEED)  # noqa: NPY002
        return _numpy_probe()

    def was_drawn_from(self, armed: float) -> bool:
        return np.random.random_sample() != armed  # noqa: NPY002


@functools.cache
def _numpy_probe() -> float:
    return float(np.random.RandomState(_PROBE_SEED).random_sample())


class _AcceleratorRng(Rng):
    """The current accelerator device's generator; without effect until this process has initialized the device."""

    def seed(self, seed: int) -> None:
        if (module := _initialized_accelerator()) is not None:
            module.manual_seed(seed)

    def get(self) -> Any:
        return None if (module := _initialized_accelerator()) is None else module.get_rng_state()

    def set(self, state: Any) -> None:
        if state is not None and (module := _initialized_accelerator()) is not None:
            module.set_rng_state(state)

    def was_drawn_from(self, armed: Any) -> bool:
        return armed is not None and super().was_drawn_from(armed)


def _initialized_accelerator() -> Any:
    module, is_initialized = _accelerator()
    return module if is_initialized() else None


@functools.cache
def _accelerator() -> tuple[Any, Callable[[], bool]]:
    device = torch.accelerator.current_accelerator()
    module = None if device is None else torch.get_device_module(device)
    return module, getattr(module, "is_initialized", bool)


TORCH: Rng = _TorchRng()
ACCELERATOR: Rng = _AcceleratorRng()
GLOBAL: tuple[Rng, ...] = (TORCH, _PythonRng(), _NumpyRng(), ACCELERATOR)


class IsolatedRng(contextlib.AbstractContextManager[None]):
    """States of ``generators`` that are set inside ``with`` blocks only; each block continues where the last one ended.

    The first block starts from ``seed``. Outside the blocks the generators have the states that they had before.
    """

    def __init__(self, seed: int, generators: Sequence[Rng]) -> None:
        self._seed = seed
        self._generators = generators
        self._inside: list[Any] | None = None
        self._outside: list[Any] = []

    def __enter__(self) -> None:
        self._outside = [rng.get() for rng in self._generators]
        if self._inside is None:
            for rng in self._generators:
                rng.seed(self._seed)
        else:
            self._set(self._inside)

    def __exit__(self, *_: object) -> None:
        self._inside = [rng.get() for rng in self._generators]
        self._set(self._outside)

    def _set(self, states: list[Any]) -> None:
        for rng, state in zip(self._generators, states, strict=True):
            rng.set(state)


class RandomUseDetector:
    """Runs a function that may draw random numbers, and seeds only the generators that it draws from.

    Seeding all generators for each sample would take longer than loading many a sample. So a generator is only watched
    until the function draws from it; then the function runs again, and seeds that generator from then on. The user's
    states are restored afterwards.
    """

    def __init__(self, held: Sequence[Rng] = ()) -> None:
        """Watch the global generators, and ``held``, which the user's own objects hold."""
        self.used: list[Rng] = []
        """The generators that were drawn from, which ``seed`` seeds."""
        self._unused: list[Rng] = [TORCH, _PythonRng(), _NumpyRng(), ACCELERATOR, *held]

    def run(self, function: Callable[[], T]) -> T:
        """Return ``function()``; it is called again if it drew from a generator that was not seeded."""
        found = [(rng, rng.isolate()) for rng in (*self.used, *self._unused)]
        try:
            while True:
                armed = [(rng, rng.arm()) for rng in self._unused]
                result = function()
                drawn_from = [rng for rng, mark in armed if rng.was_drawn_from(mark)]
                if not drawn_from:
                    return result
                for rng in drawn_from:
                    self._unused.remove(rng)
                    self.used.append(rng)
        finally:
            for rng, state in found:
                rng.restore(state)

    def seed(self, seed: int) -> None:
        """Seed the generators that were drawn from so far."""
        for rng in self.used:
            rng.seed(seed)


def generators_of(*owners: object) -> list[Rng]:
    """Return the generators that ``owners`` hold as attributes, each once.

    The data sets inside a data set (``Subset``, ``ConcatDataset``), the transforms of either, and the steps of such a
    transform are searched too.
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
        for inner in (attributes[name] for name in _WRAPPED if name in attributes):
            waiting += inner if isinstance(inner, (list, tuple)) else [inner]
    return [_UserGenerator(generator) for generator in found.values()]


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
