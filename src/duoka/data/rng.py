"""Random number generators during data loading: isolation from the user's draws, and a seed for each sample.

Samplers, augmentations and loaders draw from the process's global generators. Here they draw the same numbers on every
rank, and the user's code continues to draw as if nothing else had drawn.
"""

import contextlib
import functools
import pickle
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from duoka.utils.torch_private import numpy_has_spare_gaussian

_PROBE_SEED = 0x6A09_E667


class Rng:
    """A generator with public state; subclasses detect draws faster than by comparing states."""

    seed: Callable[[int], Any]
    """Restarts from a seed."""
    get: Callable[[], Any]
    """Returns the state."""
    set: Callable[[Any], Any]
    """Restores a state that ``get`` returned."""

    def isolate(self) -> Any:
        """Return what ``restore`` needs to undo all draws from here on; the state may change."""
        return self.get()

    def was_drawn_from(self, isolated: Any) -> bool:
        """Whether the generator was used since ``isolate`` returned ``isolated``; to be called once."""
        if isinstance(isolated, torch.Tensor):
            return not torch.equal(self.get(), isolated)
        return isolated is not None and pickle.dumps(self.get()) != pickle.dumps(isolated)

    def restore(self, isolated: Any) -> None:
        """Restore the state before ``isolate``."""
        self.set(isolated)


class _TorchRng(Rng):
    """torch's CPU generator, used directly because ``torch.manual_seed`` takes 100 times as long."""

    seed = staticmethod(torch.default_generator.manual_seed)
    get = staticmethod(torch.default_generator.get_state)
    set = staticmethod(torch.default_generator.set_state)

    def isolate(self) -> Any:
        state = self.get()
        self.set(_torch_probe()[0])
        return state

    def was_drawn_from(self, isolated: Any) -> bool:  # noqa: ARG002
        _, following, place = _torch_probe()
        return place.uniform_().item() != following


@functools.cache
def _torch_probe() -> tuple[torch.Tensor, float, torch.Tensor]:
    """Return a known state of torch's generator, the number that follows it, and a place for a draw in any mode."""
    probe = torch.Generator().manual_seed(_PROBE_SEED)
    with torch.inference_mode(False):
        place = torch.empty((), dtype=torch.float64, device="cpu")
    return probe.get_state(), place.uniform_(generator=probe).item(), place


class _PythonRng(Rng):
    """The generator of the module ``random``, whose state takes longer to read than to restore.

    So the state that was read last is used again, if the next 32 bits are those that follow it. The 32 bits after them
    detect a draw by the data set.
    """

    seed, get, set = staticmethod(random.seed), staticmethod(random.getstate), staticmethod(random.setstate)
    _state: Any = None
    _following = (0, 0)

    def isolate(self) -> Any:
        if self._state is None or self._state[2] is not None:  # taking a spare Gaussian number draws no bits
            self._begin_at(random.getstate())
        elif random.getrandbits(32) != self._following[0]:
            version, (*words, place), spare = random.getstate()  # after these 32 bits, which are one word
            self._begin_at((version, (*words, place - 1), spare))
        return self._state

    def _begin_at(self, state: Any) -> None:
        self._state, without_spare = state, (*state[:2], None)
        random.setstate(without_spare)
        self._following = random.getrandbits(32), random.getrandbits(32)
        random.setstate(without_spare)
        random.getrandbits(32)

    def was_drawn_from(self, isolated: Any) -> bool:  # noqa: ARG002
        return random.getrandbits(32) != self._following[1]


class _NumpyRng(Rng):
    """NumPy's global generator.

    Reading its state takes longer than loading many a sample. So loading uses another bit generator, whose twin shows
    which number must follow. Setting a bit generator clears the spare Gaussian number: where there is one, the whole
    state is read and restored.
    """

    get = staticmethod(functools.partial(np.random.get_state, legacy=False))
    set = staticmethod(np.random.set_state)

    def __init__(self) -> None:
        self._private, self._twin = np.random.MT19937(_PROBE_SEED), np.random.MT19937(_PROBE_SEED)

    def seed(self, seed: int) -> None:
        bits: Any = np.random.get_bit_generator()  # type: ignore[attr-defined]
        if isinstance(bits, np.random.MT19937):
            np.random.seed(seed & 0xFFFF_FFFF)  # noqa: NPY002 - the global generator is what users draw from
        else:
            self.set({**type(bits)(seed).state, "has_gauss": 0, "gauss": 0.0})

    def isolate(self) -> Any:
        bits = np.random.get_bit_generator()  # type: ignore[attr-defined]
        state = self.get() if numpy_has_spare_gaussian() else None
        np.random.set_bit_generator(self._private)  # type: ignore[attr-defined]
        return bits, state

    def was_drawn_from(self, isolated: Any) -> bool:  # noqa: ARG002
        return bool(self._private.random_raw() != self._twin.random_raw())

    def restore(self, isolated: Any) -> None:
        bits, state = isolated
        np.random.set_bit_generator(bits)  # type: ignore[attr-defined]
        if state is not None:
            self.set(state)


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


def global_rngs() -> tuple[Rng, ...]:
    """Return the process's generators of torch, Python, NumPy and the accelerator, for one detector of draws."""
    return TORCH, _PythonRng(), _NumpyRng(), ACCELERATOR


GLOBAL = global_rngs()


class IsolatedRng(contextlib.AbstractContextManager[None]):
    """States of ``generators`` that are set inside ``with`` blocks only; each block continues where the last one ended.

    The first block starts from ``seed``. Outside the blocks the generators have the states that they had before.
    """

    def __init__(self, seed: int, generators: Sequence[Rng]) -> None:
        self._seed, self._generators = seed, generators
        self._inside: list[Any] | None = None
        self._outside: list[Any] | None = None

    def __enter__(self) -> None:
        self._outside = self._swap(self._inside)

    def __exit__(self, *_: object) -> None:
        self._inside = self._swap(self._outside)

    def _swap(self, states: list[Any] | None) -> list[Any]:
        """Set ``states``, or seed if there are none; return the states before."""
        before = [rng.get() for rng in self._generators]
        if states is None:
            for rng in self._generators:
                rng.seed(self._seed)
        else:
            for rng, state in zip(self._generators, states, strict=True):
                rng.set(state)
        return before
