"""The process's global random generators, one small class each: seed, state, and a cheap mark that tells whether it moved."""

from __future__ import annotations

import ctypes
import functools
import random
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

__all__ = ["GLOBAL", "TORCH", "GlobalStream", "Stream"]


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


class GlobalStream(Stream, Protocol):
    """A generator that every piece of code in the process may draw from."""

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

    def seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    def get(self) -> Any:
        return torch.default_generator.get_state()

    def set(self, state: Any) -> None:
        torch.default_generator.set_state(state)

    def mark(self) -> torch.Tensor:
        return torch.default_generator.get_state()

    def moved(self, mark: torch.Tensor) -> bool:
        return not torch.equal(torch.default_generator.get_state(), mark)

    def rewind(self, mark: torch.Tensor) -> None:
        self.set(mark)


class _Words(NamedTuple):
    """Words of a Mersenne twister's own memory: its place and two of its 624 words, which no two states share."""

    owner: Any
    """Whose memory it is; it must not be freed while it is read."""
    place: ctypes.c_uint32
    early: ctypes.c_uint32
    late: ctypes.c_uint32

    @staticmethod
    def at(owner: Any, place: int, key: int) -> _Words:
        """Those of ``owner``, whose place and whose first word lie at these addresses."""
        words = ctypes.c_uint32
        return _Words(owner, words.from_address(place), words.from_address(key + 4), words.from_address(key + 623 * 4))

    def read(self) -> tuple[int, int, int]:
        return self.place.value, self.early.value, self.late.value


class _Twister:
    """A Mersenne twister that is watched by three of its words: reading those takes a hundredth of reading its state.

    The state itself is read again only where the words are not those of the state that was read last.
    """

    def __init__(self) -> None:
        self._words: _Words | None = None
        self._kept: tuple[tuple[int, int, int], Any] | None = None

    def get(self) -> Any:
        raise NotImplementedError

    def set(self, state: Any) -> None:
        raise NotImplementedError

    def find(self) -> _Words | None:
        """Return where its words are, ``None`` where they cannot be read."""
        raise NotImplementedError

    def mark(self) -> Any:
        words = self._words or self.find()
        if words is None:
            return None, self.get()
        self._words = words
        place = words.read()
        if self._kept is None or self._kept[0] != place:
            self._kept = (place, self.get())
        return self._kept

    def moved(self, mark: Any) -> bool:
        if mark[0] is None or self._words is None:
            return repr(self.get()) != repr(mark[1])
        return bool(self._words.read() != mark[0])

    def rewind(self, mark: Any) -> None:
        self.set(mark[1])


class _Python(_Twister):
    """What the functions of the module ``random`` draw from."""

    def seed(self, seed: int) -> None:
        random.seed(seed)

    def get(self) -> Any:
        return random.getstate()

    def set(self, state: Any) -> None:
        random.setstate(state)

    def find(self) -> _Words | None:
        """CPython's generator object is a header, a place, then 624 words: so it is, or nothing is read."""
        generator: Any = getattr(random.random, "__self__", None)
        header = object.__basicsize__
        if sys.implementation.name != "cpython" or generator.__sizeof__() < header + 4 + 624 * 4:
            return None
        words = _Words.at(generator, id(generator) + header, id(generator) + header + 4)
        state = random.getstate()[1]
        return words if words.read() == (state[624], state[1], state[623]) else None


class _Numpy(_Twister):
    """What the functions of ``numpy.random`` draw from."""

    def seed(self, seed: int) -> None:
        np.random.seed(seed & 0xFFFF_FFFF)  # noqa: NPY002 - the global generator is what users draw from

    def get(self) -> Any:
        return np.random.get_state(legacy=False)  # noqa: NPY002

    def set(self, state: Any) -> None:
        np.random.set_state(state)  # noqa: NPY002

    def find(self) -> _Words | None:
        """NumPy gives out its state's address: 624 words, then the place; ``set_bit_generator`` may have set another kind."""
        bits: Any = np.random.get_bit_generator()  # type: ignore[attr-defined]
        if not isinstance(bits, np.random.MT19937):
            return None
        address = bits.ctypes.state_address
        return _Words.at(bits, address + 624 * 4, address)


class _Accelerator:
    """The generator of the current accelerator device, once this process has initialised it."""

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


TORCH: GlobalStream = _Torch()
GLOBAL: tuple[GlobalStream, ...] = (TORCH, _Python(), _Numpy(), _Accelerator())
