"""Position in the call stack of the user's code that calls duoka."""

import sys
from pathlib import Path

import torch

_LIBRARIES = tuple(f"{folder}/" for folder in (Path(torch.__file__).parent, Path(__file__).parents[1]))


def user_stack_level() -> int:
    """Return ``stacklevel`` for a warning of the caller that names the line of the first code outside torch and duoka."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        frame, level = frame.f_back, level + 1
    return level
