"""How the command line speaks: tables and text on standard output, one plain message an error on standard error."""

from __future__ import annotations

import io
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["complain", "console", "gibibytes", "print_json"]

_PIPED_WIDTH = 160
"""Columns, where no terminal says how wide it is: room for a table without breaking its lines."""


def console() -> Console:
    """Return a console on standard output: colours on a terminal alone, and a wide page where it is piped."""
    from rich.console import Console

    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that this output cannot spell is no reason to fail
        sys.stdout.reconfigure(errors="replace")
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else _PIPED_WIDTH
    return Console(width=width, highlight=False, markup=False, emoji=False)


def print_json(value: object) -> None:
    """Print a value as JSON, for programs."""
    import json

    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def complain(message: str) -> None:
    """Write a message to standard error, exactly as it is."""
    sys.stderr.write(f"duoka: {message}\n")


def gibibytes(count: int | None) -> str:
    """Return a number of bytes as people say it, or a dash where it is not known."""
    return "-" if count is None else f"{count / 2**30:.1f} GiB"
