"""duoka (多卡, "many cards"): train a PyTorch model on every device you have, from the script you already have."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from duoka.launcher import launch
    from duoka.mirror.wrapper import DataParallel
    from duoka.world import World, current_world

__version__ = "0.1.0"

__all__ = [
    "DataParallel",
    "World",
    "current_world",
    "launch",
]

_WHERE = {
    "DataParallel": "duoka.mirror",
    "World": "duoka.world",
    "current_world": "duoka.world",
    "launch": "duoka.launcher",
}


def __getattr__(name: str) -> Any:  # imported when first used, so that `import duoka` costs next to nothing
    if name in _WHERE:
        value = getattr(importlib.import_module(_WHERE[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'duoka' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
