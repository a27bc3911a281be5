"""The states of every random generator a training run draws from, as plain tensors and numbers, exact."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

__all__ = ["rng_state", "set_rng_state"]


def rng_state() -> dict[str, Any]:
    """Return the states of Python's, NumPy's and torch's generators and of the accelerator that this process uses, if any.

    Holds numbers and tensors only, so that it goes into a checkpoint as it is; ``set_rng_state`` takes it back.

    >>> before = rng_state()
    >>> first = torch.rand(2)
    >>> set_rng_state(before)
    >>> bool((torch.rand(2) == first).all())
    True
    """
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002 - what users draw from
    return {
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
        "numpy": {
            "kind": kind,
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.get_rng_state(),
        "accelerator": _accelerator_state(),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Set the generators to what ``rng_state`` returned; an accelerator's only where there is one of the same type."""
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state(  # noqa: NPY002
        (numpy["kind"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"])
    )
    torch.set_rng_state(state["torch"].cpu())
    _set_accelerator_state(state["accelerator"])


def _accelerator_state() -> dict[str, Any] | None:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return None
    module = torch.get_device_module(accelerator.type)
    is_used = getattr(module, "is_initialized", lambda: True)  # MPS has none, and nothing to initialise
    return {"type": accelerator.type, "state": module.get_rng_state().cpu()} if is_used() else None


def _set_accelerator_state(state: dict[str, Any] | None) -> None:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if state is not None and accelerator is not None and accelerator.type == state["type"]:
        torch.get_device_module(accelerator.type).set_rng_state(state["state"].cpu())
