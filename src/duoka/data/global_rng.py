"""The process's global random generators, one small class each: seed, state, and a cheap mark that tells whether it moved."""

from __future__ import annotations

import ctypes
import functools
import pickle
import random
import struct
import sys
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch

__all__ = ["GLOBAL", "TORCH", "RngState", "WatchedRngState"]


class RngState(Protocol):
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


class WatchedRngState(RngState, Protocol):
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


_GAUSS_BYTES = 28
"""What follows the words of torch's twister: a spare Gaussian of each precision, and whether there is one."""


def _memory(address: int, size: int) -> memoryview:
    """Return ``size`` bytes at ``address``, seen as they are whenever they are read; they belong to a generator that stays."""
    return memoryview((ctypes.c_char * size).from_address(address)).cast("B")


class _Twister:
    """A Mersenne twister that is watched by a few of its bytes: reading its whole state takes many times as long.

    Every draw moves the place among its 624 words; when all were drawn they change, and the place begins again. Gaussians
    come in pairs, and taking the spare one moves nothing of that; so whether there is one is read too. The state itself is
    read again only where it is not the one that was read last.
    """

    def __init__(self) -> None:
        self._kept: tuple[Any, Any] | None = None

    def get(self) -> Any:
        raise NotImplementedError

    def set(self, state: Any) -> None:
        raise NotImplementedError

    def here(self) -> Any:
        """Return what moves with every draw, ``None`` where it cannot be read."""
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


class _Torch(_Twister):
    """torch's CPU generator; not through ``torch.manual_seed``, which takes 100 times as long."""

    def __reduce__(self) -> str:
        return "TORCH"

    def seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    def get(self) -> Any:
        return torch.default_generator.get_state()

    def set(self, state: Any) -> None:
        torch.default_generator.set_state(state)

    def here(self) -> Any:
        views = self._views
        return views and (bytes(views[0]), bytes(views[1]))

    @functools.cached_property
    def _views(self) -> tuple[memoryview, memoryview] | None:
        """The generator's object holds a place (left, seeded, next), 624 words, spare Gaussians: so it is, or nothing is read.

        ``get_state`` writes the words in 8 bytes each, after 24 of others. Source: ``at::mt19937``, ``CPUGeneratorImpl``.
        """
        address: int = getattr(torch.default_generator, "_cdata", 0)
        words = self.get().numpy()[24:].view(np.uint64)[:624].astype(np.uint32).tobytes()
        start = ctypes.string_at(address, 256).find(words[:16]) if address else -1
        if start < 0 or ctypes.string_at(address + start, len(words)) != words:
            return None
        key = address + start
        views = _memory(key - 12, 16), _memory(key + len(words), _GAUSS_BYTES)
        return views if self._shows(views) else None

    def _shows(self, views: tuple[memoryview, memoryview]) -> bool:
        """Whether each draw is seen: a number, a Gaussian, the spare one, and numbers until the words change."""
        state, seen = self.get(), []
        for draw in (torch.Tensor.uniform_, torch.Tensor.normal_, torch.Tensor.normal_):
            seen.append((bytes(views[0]), bytes(views[1])))
            draw(torch.empty(1, device="cpu"))
        seen.append((bytes(views[0]), bytes(views[1])))
        torch.empty(624, device="cpu").uniform_()
        seen.append((bytes(views[0]), bytes(views[1])))
        self.set(state)
        return len(set(seen)) == len(seen)


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
        view = self._view
        return view and (bytes(view), self._generator.gauss_next)

    @functools.cached_property
    def _generator(self) -> Any:
        return getattr(random.random, "__self__", None)

    @functools.cached_property
    def _view(self) -> memoryview | None:
        """CPython's generator object is a header, a place, then 624 words: so it is, or nothing is read."""
        generator, header = self._generator, object.__basicsize__
        if sys.implementation.name != "cpython" or generator.__sizeof__() < header + 4 + 624 * 4:
            return None
        state = random.getstate()[1]
        content = np.array([state[624], *state[:624]], dtype=np.uint32).tobytes()
        found = ctypes.string_at(id(generator) + header, len(content)) == content
        return _memory(id(generator) + header, 12) if found else None  # seeding sets the first word same_stream


class _Numpy(_Twister):
    """What the functions of ``numpy.random`` draw from."""

    def __init__(self) -> None:
        super().__init__()
        self._bits: Any = None
        self._views: tuple[memoryview, memoryview] | None = None

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
            self._bits, self._views = bits, self._find(bits)
        views = self._views
        return views and (bytes(views[0]), bytes(views[1]))

    def _find(self, bits: Any) -> tuple[memoryview, memoryview] | None:
        """NumPy gives out its state's address: 624 words, then the place."""
        if not isinstance(bits, np.random.MT19937):
            return None
        spare = self._spare()
        return (_memory(bits.ctypes.state_address + 623 * 4, 8), spare) if spare is not None else None

    def _spare(self) -> memoryview | None:
        """Whether there is a spare Gaussian, and which: they follow a pointer into their own object, or nothing is read."""
        owner: Any = np.random.mtrand._rand
        start, size, word = id(owner), type(owner).__basicsize__, 8
        for place in range(start, start + size - 2 * word, word):
            if start < ctypes.c_uint64.from_address(place).value < start + size:
                spare = _memory(place + word, 2 * word)
                return spare if self._shows(spare) else None
        return None

    def _shows(self, spare: memoryview) -> bool:
        """Whether ``spare`` follows what is set."""
        found, seen = self.get(), []
        for wanted in ((1, 0.25), (0, 0.0)):
            self.set({**found, "has_gauss": wanted[0], "gauss": wanted[1]})
            seen.append(struct.unpack("i4xd", spare) == wanted)
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
TORCH: WatchedRngState = _Torch()
PYTHON: WatchedRngState = _Python()
NUMPY: WatchedRngState = _Numpy()
ACCELERATOR: WatchedRngState = _Accelerator()
GLOBAL: tuple[WatchedRngState, ...] = (TORCH, PYTHON, NUMPY, ACCELERATOR)
