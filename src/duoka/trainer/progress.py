"""Progress display of a fit: a live line in a terminal or notebook, plain lines elsewhere, or nothing."""

import importlib.util
import math
import sys
import time
from typing import Any

LIVE_INTERVAL_S = 0.5
LINE_INTERVAL_S = 30.0


class Reporter:
    """Shows nothing; base class of the reporters that do."""

    due: float = math.inf
    """Value of ``time.perf_counter()`` from which on progress is shown; before, a step costs one comparison."""

    def say(self, text: str) -> None:
        """Show lines of text."""

    def begin_epoch(self, epoch: str, steps: int | None) -> None:
        """Begin ``epoch``, ``"1/10"`` for example, of so many optimizer steps."""

    def show(self, step: int, text: str) -> None:
        """Show the progress after a step of the epoch, and set ``due``."""

    def close(self) -> None:
        """Release the terminal."""


class LineReporter(Reporter):
    """Prints lines: for files, pipes and logs."""

    def say(self, text: str) -> None:
        """Print ``text``."""
        print(text, flush=True)

    def begin_epoch(self, epoch: str, steps: int | None) -> None:
        """Delay the first progress line, so that a short epoch has none."""
        self.epoch, self.total = epoch, "" if steps is None else f"/{steps}"
        self.due = time.perf_counter() + LINE_INTERVAL_S

    def show(self, step: int, text: str) -> None:
        """Print one line."""
        self.say(f"epoch {self.epoch} · step {step}{self.total} · {text}")
        self.due = time.perf_counter() + LINE_INTERVAL_S


class LiveReporter(Reporter):
    """Updates one line with rich, without a thread: each snapshot redraws it."""

    def __init__(self, console: Any) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

        self.console = console
        columns = SpinnerColumn(), TextColumn("epoch {task.description}"), BarColumn(bar_width=24), MofNCompleteColumn()
        text = TextColumn("{task.fields[line]}")
        self.progress = Progress(*columns, text, console=console, auto_refresh=False, transient=True)
        self.task: Any = None

    def say(self, text: str) -> None:
        """Print ``text`` above the live line."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def begin_epoch(self, epoch: str, steps: int | None) -> None:
        """Draw the empty bar."""
        self.progress.start()
        if self.task is not None:
            self.progress.remove_task(self.task)
        self.task = self.progress.add_task(epoch, total=steps, line="")
        self.due = time.perf_counter() + LIVE_INTERVAL_S / 2

    def show(self, step: int, text: str) -> None:
        """Redraw the bar."""
        self.progress.update(self.task, completed=step, line=text, refresh=True)
        self.due = time.perf_counter() + LIVE_INTERVAL_S

    def close(self) -> None:
        """Remove the live line."""
        self.progress.stop()


def reporter_for(verbose: bool) -> Reporter:
    """Return the reporter that suits the output: terminal, notebook, or file."""
    if not verbose:
        return Reporter()
    from rich.console import Console

    console = Console()
    is_terminal = console.is_terminal and sys.stdout.isatty()
    is_live = importlib.util.find_spec("ipywidgets") is not None if console.is_jupyter else is_terminal
    return LiveReporter(console) if is_live else LineReporter()


def format_number(value: Any) -> str:
    """Return ``value`` with four significant digits.

    >>> format_number(0.123456), format_number(1234567.0)
    ('0.1235', '1.235e+06')
    """
    return f"{value:.4g}" if isinstance(value, float) else str(value)
