"""The process's global random generators, one small class each: seed, state, and a cheap mark that tells whether it moved."""

from __future__ import annotations

import ctypes
import functools
import random
import struct
import sys
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch

__all__ = ["GLOBAL", "TORCH", "GlobalStream", "Stream"]

_KEY_BYTES = 624 * 4  # of MT19937: 624 words of 32 bits, and after them the place in them
_STATE_BYTES = _KEY_BYTES + 4


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


class _Python:
    """What the functions of the module ``random`` draw from. Two states take 20 µs to compare, two marks 1 µs."""

    def seed(self, seed: int) -> None:
        random.seed(seed)

    def get(self) -> Any:
        return random.getstate()

    def set(self, state: Any) -> None:
        random.setstate(state)

    def mark(self) -> Any:
        return _python_memory() if _memory_is_readable() else random.getstate()

    def moved(self, mark: Any) -> bool:
        return bool(self.mark() != mark)

    def rewind(self, mark: Any) -> None:
        self.set(_python_state(mark) if _memory_is_readable() else mark)


class _Numpy:
    """What the functions of ``numpy.random`` draw from. Its state takes 40 µs to read or write, the mark of it 1 µs."""

    def seed(self, seed: int) -> None:
        np.random.seed(seed & 0xFFFF_FFFF)  # noqa: NPY002 - the global generator is what users draw from

    def get(self) -> Any:
        return np.random.get_state(legacy=False)  # noqa: NPY002

    def set(self, state: Any) -> None:
        np.random.set_state(state)  # noqa: NPY002

    def mark(self) -> bytes:
        bits: Any = np.random.get_bit_generator()  # type: ignore[attr-defined]
        if isinstance(bits, np.random.MT19937):
            return ctypes.string_at(bits.ctypes.state_address, _STATE_BYTES)
        return repr(bits.state).encode()  # set_bit_generator was given another one: its state is a few numbers

    def moved(self, mark: bytes) -> bool:
        return self.mark() != mark

    def rewind(self, mark: bytes) -> None:
        if len(mark) != _STATE_BYTES:
            return
        key = np.frombuffer(mark[:_KEY_BYTES], dtype=np.uint32)
        state = {"key": key, "pos": int.from_bytes(mark[_KEY_BYTES:], sys.byteorder)}
        self.set({"bit_generator": "MT19937", "state": state, "has_gauss": 0, "gauss": 0.0})


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


def _python_memory() -> tuple[bytes, float | None]:
    """Return the bytes of CPython's generator object behind its header (a place, then 624 words), and its spare number."""
    generator: Any = _PYTHON
    header = object.__basicsize__
    return ctypes.string_at(id(generator) + header, _STATE_BYTES), generator.gauss_next


def _python_state(memory: tuple[bytes, float | None]) -> Any:
    """Return what ``random.getstate()`` returned when ``memory`` was read."""
    place, *words = struct.unpack("=625I", memory[0])
    return 3, (*words, place), memory[1]


@functools.cache
def _memory_is_readable() -> bool:
    """Whether this interpreter lays its generator out as ``_python_memory`` reads it: found by comparing the two."""
    if sys.implementation.name != "cpython" or _PYTHON.__sizeof__() < object.__basicsize__ + _STATE_BYTES:
        return False
    return bool(_python_state(_python_memory()) == random.getstate())


def _device_module() -> Any:
    """Return torch's module of the accelerator if this process has initialised it, else ``None``."""
    module, is_initialized = _device()
    return module if is_initialized() else None


@functools.cache
def _device() -> tuple[Any, Callable[[], bool]]:
    device = torch.accelerator.current_accelerator()
    module = None if device is None else torch.get_device_module(device)
    return module, getattr(module, "is_initialized", bool)


_PYTHON: Any = getattr(random.random, "__self__", None)  # the object that the module's functions are methods of
TORCH: GlobalStream = _Torch()
GLOBAL: tuple[GlobalStream, ...] = (TORCH, _Python(), _Numpy(), _Accelerator())
