"""The process's global random generators, one small class each: seed, state, and a cheap mark that tells whether it moved."""

from __future__ import annotations

import ctypes
import functools
import operator
import pickle
import random
import sys
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch

__all__ = ["GLOBAL", "TORCH", "Stream", "WatchedStream"]


class Stream(Protocol):
    """A generator that somebody draws from."""

    def seed(self, seed: int) -> None:
        """Start anew from ``seed``."""
        ...

    def get(self) -> Any:
        """Return the whole state."""
        ...

    def set(self, state: Any) -> None:
        """Continue from a state that ``get`` returned."""
        ...


class WatchedStream(Stream, Protocol):
    """A generator that tells cheaply whether it was drawn from."""

    def mark(self) -> Any:
        """Return, cheaply, where the generator is."""
        ...

    def moved(self, mark: Any) -> bool:
        """Whether anything was drawn since ``mark`` was taken."""
        ...

    def rewind(self, mark: Any) -> None:
        """Continue from where ``mark`` was taken."""
        ...


class _Torch:
    """torch's CPU generator; not through ``torch.manual_seed``, which takes 100 times as long."""

    def __reduce__(self) -> str:
        return "TORCH"

    def seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    def get(self) -> Any:
        return torch.default_generator.get_state()

    def set(self, state: Any) -> None:
        torch.default_generator.set_state(state)

    def mark(self) -> torch.Tensor:
        return torch.default_generator.get_state()

    def moved(self, mark: torch.Tensor) -> bool:
        now, size = (
            torch.default_generator.get_state(),
            mark.numel(),
        )  # of bytes, which torch.equal takes longer to compare
        return ctypes.string_at(now.data_ptr(), size) != ctypes.string_at(mark.data_ptr(), size)

    def rewind(self, mark: torch.Tensor) -> None:
        self.set(mark)


Words: TypeAlias = tuple[Any, ...]
"""Memory of a generator's own, which must not be freed while it is read: numbers of ctypes."""
_value = operator.attrgetter("value")


def _words_at(place: int, key: int) -> Words:
    """Return a Mersenne twister's place and two of its 624 words, which no two states share, by their addresses."""
    word = ctypes.c_uint32
    return word.from_address(place), word.from_address(key + 4), word.from_address(key + 623 * 4)


class _Twister:
    """A Mersenne twister that is watched by three of its words: reading those takes a hundredth of reading its state.

    Gaussians come in pairs, and taking the spare one moves no word; so whether there is one is read too. The state itself is
    read again only where it is not the one that was read last.
    """

    def __init__(self) -> None:
        self._kept: tuple[Any, Any] | None = None

    def get(self) -> Any:
        raise NotImplementedError

    def set(self, state: Any) -> None:
        raise NotImplementedError

    def here(self) -> Any:
        """Return the words and the spare Gaussian, ``None`` where they cannot be read."""
        raise NotImplementedError

    def mark(self) -> Any:
        here = self.here()
        if here is None:
            return None, self.get()
        if self._kept is None or self._kept[0] != here:
            self._kept = (here, self.get())
        return self._kept

    def moved(self, mark: Any) -> bool:
        here, state = mark
        return bool(self.here() != here) if here is not None else pickle.dumps(self.get()) != pickle.dumps(state)

    def rewind(self, mark: Any) -> None:
        self.set(mark[1])


class _Python(_Twister):
    """What the functions of the module ``random`` draw from."""

    def __reduce__(self) -> str:
        return "PYTHON"

    def seed(self, seed: int) -> None:
        random.seed(seed)

    def get(self) -> Any:
        return random.getstate()

    def set(self, state: Any) -> None:
        random.setstate(state)

    def here(self) -> Any:
        return self._words and (*map(_value, self._words), self._generator.gauss_next)

    @functools.cached_property
    def _generator(self) -> Any:
        return getattr(random.random, "__self__", None)

    @functools.cached_property
    def _words(self) -> Words | None:
        """CPython's generator object is a header, a place, then 624 words: so it is, or nothing is read."""
        generator, header = self._generator, object.__basicsize__
        if sys.implementation.name != "cpython" or generator.__sizeof__() < header + 4 + 624 * 4:
            return None
        words = _words_at(id(generator) + header, id(generator) + header + 4)
        state = random.getstate()[1]
        return words if tuple(map(_value, words)) == (state[624], state[1], state[623]) else None


class _Numpy(_Twister):
    """What the functions of ``numpy.random`` draw from."""

    def __init__(self) -> None:
        super().__init__()
        self._bits: Any = None
        self._words: Words | None = None

    def __reduce__(self) -> str:
        return "NUMPY"

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

    def here(self) -> Any:
        bits: Any = np.random.get_bit_generator()  # type: ignore[attr-defined]
        if bits is not self._bits:  # ``set_bit_generator`` may set another, of another kind, at any time
            self._bits, self._words = bits, self._find(bits)
        return self._words and tuple(map(_value, self._words))

    def _find(self, bits: Any) -> Words | None:
        """NumPy gives out its state's address: 624 words, then the place."""
        if not isinstance(bits, np.random.MT19937):
            return None
        address = bits.ctypes.state_address
        spare = self._spare()
        return spare and (*_words_at(address + 624 * 4, address), *spare)

    def _spare(self) -> Words | None:
        """Whether there is a spare Gaussian, and which: they follow a pointer into their own object, or nothing is read."""
        owner: Any = np.random.mtrand._rand
        start, size, word = id(owner), type(owner).__basicsize__, 8
        for place in range(start, start + size - 2 * word, word):
            if start < ctypes.c_uint64.from_address(place).value < start + size:
                spare = ctypes.c_int.from_address(place + word), ctypes.c_double.from_address(place + 2 * word)
                return spare if self._shows(spare) else None
        return None

    def _shows(self, spare: Words) -> bool:
        """Whether ``spare`` follows what is set."""
        found, seen = self.get(), []
        for wanted in ((1, 0.25), (0, 0.0)):
            self.set({**found, "has_gauss": wanted[0], "gauss": wanted[1]})
            seen.append(tuple(map(_value, spare)) == wanted)
        self.set(found)
        return all(seen)


class _Accelerator:
    """The generator of the current accelerator device, once this process has initialised it."""

    def __reduce__(self) -> str:
        return "ACCELERATOR"

    def seed(self, seed: int) -> None:
        if (module := _device_module()) is not None:
            module.manual_seed(seed)

    def get(self) -> Any:
        return None if (module := _device_module()) is None else module.get_rng_state()

    def set(self, state: Any) -> None:
        if state is not None and (module := _device_module()) is not None:
            module.set_rng_state(state)

    def mark(self) -> torch.Tensor | None:
        return None if (module := _device_module()) is None else module.get_rng_state()

    def moved(self, mark: torch.Tensor | None) -> bool:
        return mark is not None and not torch.equal(self.get(), mark)

    def rewind(self, mark: torch.Tensor | None) -> None:
        self.set(mark)


def _device_module() -> Any:
    """Return torch's module of the accelerator if this process has initialised it, else ``None``."""
    module, is_initialized = _device()
    return module if is_initialized() else None


@functools.cache
def _device() -> tuple[Any, Callable[[], bool]]:
    device = torch.accelerator.current_accelerator()
    module = None if device is None else torch.get_device_module(device)
    return module, getattr(module, "is_initialized", bool)


# Each is one object in a process: pickled, it is a name, since what it has seen of memory means nothing to another process.
TORCH: WatchedStream = _Torch()
PYTHON: WatchedStream = _Python()
NUMPY: WatchedStream = _Numpy()
ACCELERATOR: WatchedStream = _Accelerator()
GLOBAL: tuple[WatchedStream, ...] = (TORCH, PYTHON, NUMPY, ACCELERATOR)
