"""States of the global random number generators: Python, NumPy, torch on CPU, and the current accelerator."""

import contextlib
import hashlib
import pickle
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def rng_state() -> dict[str, Any]:
    """Return the states of all global generators as numbers and tensors, which a checkpoint can hold.

    The accelerator's state is included only if this process has initialized the accelerator.

    >>> before = rng_state()
    >>> first = torch.rand(2)
    >>> set_rng_state(before)
    >>> bool((torch.rand(2) == first).all())
    True
    """
    (version, words, gauss), (kind, keys, position, has_gauss, cached), host, accelerator = raw_rng_state()
    return {
        "python": {"version": version, "words": torch.from_numpy(np.array(words)), "gauss": gauss},
        "numpy": {
            "kind": kind,
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": host,
        "accelerator": accelerator,
    }


def raw_rng_state() -> tuple[Any, ...]:
    """Return the states of all global generators in their libraries' own form, which takes microseconds."""
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), _accelerator_state()  # noqa: NPY002


def set_raw_rng_state(state: tuple[Any, ...]) -> None:
    """Restore what ``raw_rng_state`` returned."""
    python, numpy, host, accelerator = state
    random.setstate(python)
    np.random.set_state(numpy)  # noqa: NPY002
    torch.set_rng_state(host)
    present = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None and present is not None and present.type == accelerator["type"]:
        torch.get_device_module(present.type).set_rng_state(accelerator["state"].cpu())


def libraries_that_drew(before: tuple[Any, ...]) -> list[str]:
    """Return whose global generators have changed since ``raw_rng_state`` returned ``before``: ``NumPy's``, ..."""
    python, numpy, host, accelerator = raw_rng_state()
    devices = [state["state"] for state in (accelerator, before[3]) if state is not None]
    changed = {
        "Python's": python != before[0],
        "NumPy's": pickle.dumps(numpy) != pickle.dumps(before[1]),
        "torch's": not torch.equal(host, before[2]) or not all(torch.equal(state, devices[0]) for state in devices),
    }
    return [name for name, is_changed in changed.items() if is_changed]


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what ``rng_state`` returned; an accelerator's state only if one of the same type is present."""
    python, numpy = state["python"], state["numpy"]
    raw_python = python["version"], tuple(python["words"].tolist()), python["gauss"]
    keys = numpy["keys"].numpy().astype(np.uint32)
    raw_numpy = numpy["kind"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"]
    set_raw_rng_state((raw_python, raw_numpy, state["torch"].cpu(), state["accelerator"]))


@contextlib.contextmanager
def preserve_rng_state() -> Iterator[None]:
    """Restore all global generators after the ``with`` block.

    >>> before = torch.initial_seed()
    >>> with preserve_rng_state():
    ...     seed_all(1)
    >>> torch.initial_seed() == before
    True
    """
    state = raw_rng_state()
    try:
        yield
    finally:
        set_raw_rng_state(state)


def seed_all(seed: int) -> None:
    """Seed all global generators, with the same seed."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - user code draws from it


def state_of(generator: Any) -> Any:
    """Return the state of a generator object of torch, NumPy or Python."""
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def set_state_of(generator: Any, state: Any) -> None:
    """Restore what ``state_of`` returned."""
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


def reseed(generator: torch.Generator | np.random.Generator | np.random.RandomState | random.Random, seed: int) -> None:
    """Seed a generator object of torch, NumPy or Python."""
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = type(generator.bit_generator)(seed).state
    else:
        generator.seed(seed % 2**32)


def draw_seed_from_copy(high: int) -> int:
    """Draw a seed below ``high`` from a copy of torch's CPU generator, so that the user's draws do not change."""
    generator = torch.Generator("cpu")
    generator.set_state(torch.get_rng_state())
    return int(torch.randint(high, (), generator=generator, device="cpu"))


def hash_seed(*parts: object) -> int:
    """Return a 64-bit seed that is a hash of ``parts`` (numbers and strings), the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def derive_seed(*parts: object) -> int:
    """Return a 63-bit seed, which fits into an int64: ``hash_seed`` without its last bit.

    >>> derive_seed(0, "epoch", 3) == derive_seed(0, "epoch", 3) != derive_seed(0, "epoch", 4)
    True
    """
    return hash_seed(*parts) >> 1


def _accelerator_state() -> dict[str, Any] | None:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return None
    module = torch.get_device_module(accelerator.type)
    is_used = getattr(module, "is_initialized", lambda: True)  # MPS lacks the function and needs no initialization
    return {"type": accelerator.type, "state": module.get_rng_state().cpu()} if is_used() else None
