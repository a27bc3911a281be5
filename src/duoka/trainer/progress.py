"""Progress display of a fit: a live line in a terminal or notebook, plain lines elsewhere, or nothing."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch

from duoka.utils.text import format_duration

LIVE_INTERVAL_S = 0.5
LINE_INTERVAL_S = 30.0


@dataclass(frozen=True)
class Snapshot:
    """Progress of an epoch, read at most twice a second."""

    epoch: int
    epochs: int
    step: int
    steps: int | None
    """Optimizer steps of the epoch: done, and in total."""
    loss: float
    samples_per_s: float
    eta_s: float | None
    """Seconds until the end of the fit."""
    memory_bytes: int | None
    """Peak memory of tensors on this device; ``None`` on the CPU."""

    def line(self) -> str:
        """Return the snapshot as one line."""
        parts = [f"loss {format_number(self.loss)}", f"{self.samples_per_s:,.0f} samples/s"]
        if self.memory_bytes is not None:
            parts.append(f"{self.memory_bytes / 2**30:.1f} GiB")
        if self.eta_s is not None:
            parts.append(f"{format_duration(self.eta_s)} left")
        return " · ".join(parts)


class Reporter:
    """Shows nothing; base class of the reporters that do."""

    due: float = math.inf
    """Value of ``time.perf_counter()`` from which on a snapshot is shown; before, a step costs one comparison."""

    def say(self, text: str) -> None:
        """Show lines of text."""

    def begin_epoch(self, epoch: int, epochs: int, steps: int | None) -> None:
        """Begin an epoch."""

    def show(self, snapshot: Snapshot) -> None:
        """Show the progress, and set ``due``."""

    def close(self) -> None:
        """Release the terminal."""


class LineReporter(Reporter):
    """Prints lines: for files, pipes and logs."""

    def say(self, text: str) -> None:
        """Print ``text``."""
        print(text, flush=True)

    def begin_epoch(self, epoch: int, epochs: int, steps: int | None) -> None:  # noqa: ARG002
        """Delay the first progress line, so that a short epoch has none."""
        self.due = time.perf_counter() + LINE_INTERVAL_S

    def show(self, snapshot: Snapshot) -> None:
        """Print one line."""
        total = "" if snapshot.steps is None else f"/{snapshot.steps}"
        self.say(f"epoch {snapshot.epoch}/{snapshot.epochs} · step {snapshot.step}{total} · {snapshot.line()}")
        self.due = time.perf_counter() + LINE_INTERVAL_S


class LiveReporter(Reporter):
    """Updates one line with rich, without a thread: each snapshot redraws it."""

    def __init__(self, console: Any) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

        self.console = console
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("epoch {task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[line]}"),
            console=console,
            auto_refresh=False,
            transient=True,
        )
        self.task: Any = None

    def say(self, text: str) -> None:
        """Print ``text`` above the live line."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def begin_epoch(self, epoch: int, epochs: int, steps: int | None) -> None:
        """Draw the empty bar."""
        self.progress.start()
        if self.task is not None:
            self.progress.remove_task(self.task)
        self.task = self.progress.add_task(f"{epoch}/{epochs}", total=steps, line="")
        self.due = time.perf_counter() + LIVE_INTERVAL_S / 2

    def show(self, snapshot: Snapshot) -> None:
        """Redraw the bar."""
        self.progress.update(self.task, completed=snapshot.step, line=snapshot.line(), refresh=True)
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
    if console.is_jupyter:
        return LiveReporter(console) if _has_widgets() else LineReporter()
    return LiveReporter(console) if console.is_terminal and sys.stdout.isatty() else LineReporter()


def _has_widgets() -> bool:
    import importlib.util

    return importlib.util.find_spec("ipywidgets") is not None


def device_memory_bytes(device: torch.device) -> int | None:
    """Return the peak memory of tensors on ``device``, ``None`` on the CPU."""
    if device.type == "cpu":
        return None
    try:
        return int(torch.get_device_module(device).max_memory_allocated(device))
    except (AttributeError, RuntimeError):
        return None


def format_number(value: Any) -> str:
    """Return ``value`` with four significant digits.

    >>> format_number(0.123456), format_number(1234567.0), format_number(float("nan"))
    ('0.1235', '1.235e+06', 'nan')
    """
    return f"{value:.4g}" if isinstance(value, float) else str(value)
