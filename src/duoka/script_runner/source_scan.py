"""Code of the script: the source of its modules, and the line of it that is running."""

import ast
import contextlib
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from duoka.utils.library_files import is_library_file

_DUOKA = Path(__file__).parents[1]
_LIBRARIES = ("torch", "duoka", "contextlib", "functools", "importlib")


def new_sources(seen: set[str]) -> Iterator[bytes]:
    """Yield the source of each module that belongs to the script, not to Python or a library; add its path to ``seen``."""
    for module in list(sys.modules.values()):
        path = getattr(module, "__file__", None)
        if not isinstance(path, str) or path in seen:
            continue
        seen.add(path)
        if path.endswith(".py") and not _is_in_library(path):
            with contextlib.suppress(OSError):
                yield Path(path).read_bytes()


def differentiates_gradients(source: bytes) -> bool | None:
    """Return whether a call in the source has ``create_graph=True``; ``None`` if the value is known at run time only."""
    if b"create_graph" not in source:
        return False
    try:
        calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # Python reports it
        return False
    values = [keyword.value for call in calls for keyword in call.keywords if keyword.arg == "create_graph"]
    constants = [bool(value.value) for value in values if isinstance(value, ast.Constant)]
    return any(constants) or (None if len(constants) < len(values) else False)


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
        if not _is_library(frame) and not _is_in_library(file):
            is_cell = file.startswith("<") or "ipykernel_" in file
            return f"line {line}" + (" of a cell" if is_cell else f" of {Path(file).name}")
    return "an unknown line"


def _is_in_library(file: str) -> bool:
    """Return whether a file belongs to Python, to an installed library or to duoka."""
    return file.startswith(f"{_DUOKA}/") or is_library_file(file)


def _is_library(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] in _LIBRARIES
