"""duoka (多卡, "many cards"): train a PyTorch model on every device you have, from the script you already have."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from duoka import checkpoint, data, devices, errors, scaling
    from duoka.checkpoint import load, save, unwrap
    from duoka.data_parallel.module import DataParallel
    from duoka.launcher import launch
    from duoka.trainer import Callback, Trainer, TrainerConfig
    from duoka.workers import close_workers
    from duoka.world import World, current_world

__version__ = "0.1.0"

__all__ = [
    "Callback",
    "DataParallel",
    "Trainer",
    "TrainerConfig",
    "World",
    "checkpoint",
    "close_workers",
    "current_world",
    "data",
    "devices",
    "errors",
    "launch",
    "load",
    "save",
    "scaling",
    "unwrap",
]

_PACKAGES = {
    "checkpoint": ("load", "save", "unwrap"),
    "data_parallel": ("DataParallel",),
    "launcher": ("launch",),
    "trainer": ("Callback", "Trainer", "TrainerConfig"),
    "workers": ("close_workers",),
    "world": ("World", "current_world"),
}
_PACKAGE_OF = {name: package for package, names in _PACKAGES.items() for name in names}
_MODULES = frozenset({"checkpoint", "data", "devices", "errors", "scaling"})


def __getattr__(name: str) -> Any:  # imports on first use, so that `import duoka` is fast
    if name in _MODULES:
        return importlib.import_module(f"duoka.{name}")
    if name in _PACKAGE_OF:
        value = globals()[name] = getattr(importlib.import_module(f"duoka.{_PACKAGE_OF[name]}"), name)
        return value
    raise AttributeError(f"module 'duoka' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
