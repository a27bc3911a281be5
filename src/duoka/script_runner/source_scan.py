"""The text of the modules that belong to a script: not those of Python, of installed libraries, or of duoka."""

from __future__ import annotations

import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

__all__ = ["Sources", "differentiates_gradients"]


def differentiates_gradients(source: bytes) -> bool:
    """Whether a text spells out ``create_graph=``, with anything but ``False``."""
    return re.search(rb"create_graph\s*=\s*(?!\s*False)", source) is not None


class Sources:
    """Finds what the script has imported, each module once."""

    def __init__(self) -> None:
        kinds = ("stdlib", "platstdlib", "purelib", "platlib")
        folders = {
            *(sysconfig.get_path(kind) for kind in kinds),
            *(entry for entry in sys.path if "-packages" in entry),
        }
        self._others = tuple(f"{folder}/" for folder in (*folders, str(Path(__file__).parents[1])))
        self._seen: set[str] = set()

    def new(self) -> Iterator[bytes]:
        """Yield the text of modules that were imported since the last time."""
        for module in list(sys.modules.values()):
            name = getattr(module, "__file__", None)
            if not isinstance(name, str) or name in self._seen:
                continue
            self._seen.add(name)
            if name.endswith(".py") and not name.startswith(self._others):
                try:
                    yield Path(name).read_bytes()
                except OSError:
                    continue
