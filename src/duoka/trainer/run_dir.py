"""The run folder: what a fit leaves on disk. Nothing is kept open between two writes but TensorBoard's events."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch

from duoka.checkpoint import atomic_write
from duoka.errors import MissingDependencyError, StorageError
from duoka.trainer.plots import curves_png

__all__ = ["NullRunDir", "RunDir"]

CURVES_INTERVAL_S = 30.0
STALE = ("checkpoint/last.pt", "model.safetensors", "plots/curves.png", "events.out.tfevents.*")
"""What a run writes that another one, which begins in the same folder, must not be taken for."""


class NullRunDir:
    """Writes nothing: ``out_dir`` is ``None``, or this is not rank 0."""

    path: Path | None = None

    def start(self, options: dict[str, Any], history: list[dict[str, Any]], *, anew: bool) -> None:
        """Prepare the folder."""

    def log(self, text: str) -> None:
        """Add lines to ``log.txt``."""

    def record(self, history: list[dict[str, Any]]) -> None:
        """Write the records of all epochs so far."""

    def finish(self, history: list[dict[str, Any]]) -> None:
        """Draw the last curves."""

    def close(self) -> None:
        """Close what is open."""


class RunDir(NullRunDir):
    """``trainer.yml``, ``metrics.jsonl``, ``log.txt``, ``plots/curves.png`` and TensorBoard's ``events.*`` in one folder."""

    def __init__(self, path: str | Path, tensorboard: bool | None) -> None:
        self.path: Path = Path(path)
        self.tensorboard = tensorboard
        self.events: Any = None
        self.drawn_at = 0.0

    def start(self, options: dict[str, Any], history: list[dict[str, Any]], *, anew: bool) -> None:
        """Write the trainer's options, and the records that a resumed run begins with.

        Where a run begins ``anew``, what another left behind goes first, so that nobody goes on from it.
        """
        import yaml

        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for name in STALE if anew else ():
                for left in self.path.glob(name):
                    left.unlink()
        except OSError as error:
            raise StorageError(
                f"out_dir={str(self.path)!r} cannot be made ready: {error}; name a folder that is writable"
            ) from error
        self._write("trainer.yml", yaml.safe_dump(options, sort_keys=False, allow_unicode=True).encode())
        self._write("metrics.jsonl", _lines(history))
        if anew:
            self._write("log.txt", b"")
        self.events = _event_writer(self.path, self.tensorboard)

    def log(self, text: str) -> None:
        """Add lines to ``log.txt``."""
        path = self.path / "log.txt"
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(text + "\n")
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error}; free some space, or name another out_dir") from error

    def record(self, history: list[dict[str, Any]]) -> None:
        """Write the records of all epochs so far, and now and then the curves."""
        self._write("metrics.jsonl", _lines(history))
        if self.events is not None:
            latest = history[-1]
            for name, value in latest.items():
                if isinstance(value, (int, float)) and name not in ("epoch", "step"):
                    self.events.add_scalar(name, value, latest["step"])
        if time.perf_counter() - self.drawn_at > CURVES_INTERVAL_S and self.drawn_at:
            self._draw(history)
        self.drawn_at = self.drawn_at or time.perf_counter()

    def finish(self, history: list[dict[str, Any]]) -> None:
        """Draw the curves of the whole run."""
        if history:
            self._draw(history)

    def close(self) -> None:
        """Close the event file and its thread."""
        if self.events is not None:
            self.events.close()
            self.events = None

    def _draw(self, history: list[dict[str, Any]]) -> None:
        self._write("plots/curves.png", curves_png(history))
        self.drawn_at = time.perf_counter()

    def _write(self, name: str, content: bytes) -> None:
        with atomic_write(self.path / name) as file:
            file.write(content)


def _lines(history: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(_json(record), ensure_ascii=False) + "\n" for record in history).encode()


def _json(value: Any) -> Any:
    """Return ``value`` in what JSON has: tensors as lists, and ``null`` for numbers that are none."""
    if isinstance(value, torch.Tensor):
        return _json(value.tolist())
    if isinstance(value, dict):
        return {str(name): _json(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _event_writer(path: Path, wanted: bool | None) -> Any:
    if wanted is False:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        if wanted:
            raise MissingDependencyError(
                "tensorboard=True needs TensorBoard, which is not installed: pip install 'duoka[track]'"
            ) from error
        return None
    return SummaryWriter(str(path))
