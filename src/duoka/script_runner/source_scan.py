"""Code of the script: the source of its modules, and the line of it that is running."""

from __future__ import annotations

import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

_LIBRARIES = ("torch", "duoka", "contextlib", "functools", "importlib")


class ScriptSources:
    """Source of the modules that belong to the script, not to Python, a library or duoka."""

    def __init__(self) -> None:
        kinds = ("stdlib", "platstdlib", "purelib", "platlib")
        folders = {sysconfig.get_path(kind) for kind in kinds} | {entry for entry in sys.path if "-packages" in entry}
        self._library_prefixes = tuple(f"{folder}/" for folder in (*folders, str(Path(__file__).parents[1])))
        self._seen: set[str] = set()

    def new(self) -> Iterator[bytes]:
        """Yield the source of each module imported since the last call."""
        for module in list(sys.modules.values()):
            path = getattr(module, "__file__", None)
            if not isinstance(path, str) or path in self._seen:
                continue
            self._seen.add(path)
            if path.endswith(".py") and not path.startswith(self._library_prefixes):
                try:
                    yield Path(path).read_bytes()
                except OSError:
                    continue


def differentiates_gradients(source: bytes) -> bool:
    """Return whether the source contains ``create_graph=`` with a value other than ``False``."""
    return re.search(rb"create_graph\s*=\s*(?!\s*False)", source) is not None


def is_called_by_script() -> bool:
    """Return whether the script, not a library, called the function whose patch calls this."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__") == "duoka.script_runner.patching":
        frame = frame.f_back
    return frame is None or not _is_library(frame)


def caller_location() -> str:
    """Return file and line of the innermost running frame that belongs to the script."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not _is_library(frame) and "site-packages" not in file:
            is_cell = file.startswith("<") or "ipykernel_" in file
            return f"line {frame.f_lineno}" + (" of a cell" if is_cell else f" of {Path(file).name}")
        frame = frame.f_back
    return "an unknown line"


def _is_library(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] in _LIBRARIES
