"""Code of the script: the source of its modules, and the line of it that is running."""

import contextlib
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

_LIBRARIES = ("torch", "duoka", "contextlib", "functools", "importlib")


def new_sources(seen: set[str]) -> Iterator[bytes]:
    """Yield the source of each module that belongs to the script, not to Python or a library; add its path to ``seen``."""
    kinds = ("stdlib", "platstdlib", "purelib", "platlib")
    folders = {sysconfig.get_path(kind) for kind in kinds} | {entry for entry in sys.path if "-packages" in entry}
    library_prefixes = tuple(f"{folder}/" for folder in (*folders, str(Path(__file__).parents[1])))
    for module in list(sys.modules.values()):
        path = getattr(module, "__file__", None)
        if not isinstance(path, str) or path in seen:
            continue
        seen.add(path)
        if path.endswith(".py") and not path.startswith(library_prefixes):
            with contextlib.suppress(OSError):
                yield Path(path).read_bytes()


def differentiates_gradients(source: bytes) -> bool:
    """Return whether the source contains ``create_graph=`` with a value other than ``False``."""
    return re.search(rb"create_graph\s*=\s*(?!\s*False)", source) is not None


def is_called_by_script() -> bool:
    """Return whether the script, not a library, called the function whose patch calls this."""
    callers = (frame for frame, _ in traceback.walk_stack(sys._getframe(2)))
    patching = "duoka.script_runner.patching"
    caller = next((frame for frame in callers if frame.f_globals.get("__name__") != patching), None)
    return caller is None or not _is_library(caller)


def caller_location() -> str:
    """Return file and line of the innermost running frame that belongs to the script."""
    for frame, line in traceback.walk_stack(sys._getframe(1)):
        file = frame.f_code.co_filename
        if not _is_library(frame) and "site-packages" not in file:
            is_cell = file.startswith("<") or "ipykernel_" in file
            return f"line {line}" + (" of a cell" if is_cell else f" of {Path(file).name}")
    return "an unknown line"


def _is_library(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] in _LIBRARIES
