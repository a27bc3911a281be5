"""What a person sees while training runs: a live line in a terminal or notebook, plain lines elsewhere, or nothing."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["LineReporter", "LiveReporter", "Reporter", "Snapshot", "device_memory_bytes", "reporter_for"]

LIVE_INTERVAL_S = 0.5
LINE_INTERVAL_S = 30.0


@dataclass(frozen=True)
class Snapshot:
    """How far an epoch is, read at most twice a second."""

    epoch: int
    epochs: int
    step: int
    steps: int | None
    """Optimiser steps of the epoch, done and all of them."""
    loss: float
    samples_per_s: float
    eta_s: float | None
    """Seconds until the end of the whole fit."""
    memory_bytes: int | None
    """Largest memory that tensors took on this device so far; ``None`` on the CPU."""

    def words(self) -> str:
        """Return it as one line."""
        parts = [f"loss {number(self.loss)}", f"{self.samples_per_s:,.0f} samples/s"]
        if self.memory_bytes is not None:
            parts.append(f"{self.memory_bytes / 2**30:.1f} GiB")
        if self.eta_s is not None:
            parts.append(f"{duration(self.eta_s)} left")
        return " · ".join(parts)


class Reporter:
    """Says nothing. The others show what they are told; ``due`` is when the next snapshot is wanted."""

    due: float = math.inf
    """``time.perf_counter()`` at which a snapshot is wanted: until then a step costs one comparison."""

    def say(self, text: str) -> None:
        """Show ``text`` on lines of its own."""

    def begin_epoch(self, epoch: int, epochs: int, steps: int | None) -> None:
        """An epoch begins."""

    def show(self, snapshot: Snapshot) -> None:
        """Show how far it is, and set ``due``."""

    def end_epoch(self) -> None:
        """The epoch has ended."""

    def close(self) -> None:
        """Give the terminal back."""


class LineReporter(Reporter):
    """Prints lines: for files, pipes and logs."""

    def say(self, text: str) -> None:
        """Print ``text``."""
        print(text, flush=True)

    def begin_epoch(self, epoch: int, epochs: int, steps: int | None) -> None:  # noqa: ARG002
        """Wait before the first line about this epoch, so that short epochs have none."""
        self.due = time.perf_counter() + LINE_INTERVAL_S

    def show(self, snapshot: Snapshot) -> None:
        """Print one line."""
        self.say(
            f"epoch {snapshot.epoch}/{snapshot.epochs} · step {snapshot.step}{_of(snapshot.steps)} · {snapshot.words()}"
        )
        self.due = time.perf_counter() + LINE_INTERVAL_S


class LiveReporter(Reporter):
    """Keeps one line up to date with rich. It has no thread: it is drawn when a snapshot comes."""

    def __init__(self, console: Any) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

        self.console = console
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("epoch {task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[words]}"),
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
        self.task = self.progress.add_task(f"{epoch}/{epochs}", total=steps, words="")
        self.due = time.perf_counter() + LIVE_INTERVAL_S / 2

    def show(self, snapshot: Snapshot) -> None:
        """Draw the bar anew."""
        self.progress.update(self.task, completed=snapshot.step, words=snapshot.words(), refresh=True)
        self.due = time.perf_counter() + LIVE_INTERVAL_S

    def close(self) -> None:
        """Take the live line away."""
        self.progress.stop()


def reporter_for(verbose: bool) -> Reporter:
    """Return what fits where the output goes."""
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
    """Return the most that tensors have taken on ``device`` so far."""
    if device.type == "cpu":
        return None
    try:
        return int(torch.get_device_module(device).max_memory_allocated(device))
    except (AttributeError, RuntimeError):
        return None


def number(value: Any) -> str:
    """Return ``value`` with four digits.

    >>> number(0.123456), number(1234567.0), number(float("nan"))
    ('0.1235', '1.235e+06', 'nan')
    """
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """Return a length of time in words.

    >>> duration(3.2), duration(75), duration(7384)
    ('3.2 s', '1 min 15 s', '2 h 03 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _of(total: int | None) -> str:
    return "" if total is None else f"/{total}"
