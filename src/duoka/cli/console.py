"""Output of the commands: tables and text on standard output, one line an error on standard error."""

from __future__ import annotations

import io
import json
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


_PIPED_WIDTH = 160
"""Columns if the output is no terminal: room for a table on unbroken lines."""


def console() -> Console:
    """Return a console on standard output, with colors on a terminal; it wraps tables, printed with ``soft_wrap=False``."""
    from rich.console import Console

    if isinstance(sys.stdout, io.TextIOWrapper):  # an encoding without some letters must not raise
        sys.stdout.reconfigure(errors="replace")
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else _PIPED_WIDTH
    return Console(width=width, highlight=False, markup=False, emoji=False, soft_wrap=True)


def print_json(value: object) -> None:
    """Print a value as JSON, for programs."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def print_error(message: str) -> None:
    """Write a message to standard error, without formatting."""
    sys.stderr.write(f"duoka: {message}\n")


def gibibytes(count: int | None) -> str:
    """Return bytes in GiB, or a dash for an unknown number."""
    return "-" if count is None else f"{count / 2**30:.1f} GiB"
