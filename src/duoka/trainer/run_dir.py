"""Files that a fit writes into ``out_dir``; only TensorBoard's event file stays open between two writes."""

import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from duoka.errors import StorageError
from duoka.log import logger
from duoka.trainer.plots import draw_curves
from duoka.utils.files import atomic_write
from duoka.utils.imports import import_optional
from duoka.utils.pytree import map_leaves

CURVES_INTERVAL_S = 30.0
RESULTS = ("checkpoint/[!.]*.pt*", "model.safetensors")
"""Files of a run that must not be lost."""
RECORDS = ("trainer.yml", "metrics.jsonl", "log.txt", "plots/curves.png", "events.out.tfevents.*")


class RunDir:
    """Folder with ``trainer.yml``, ``metrics.jsonl``, ``log.txt``, ``plots/curves.png`` and TensorBoard's ``events.*``."""

    def __init__(self, path: str | Path, tensorboard: bool | None) -> None:
        self.path = Path(path)
        self.tensorboard = tensorboard
        self.events: Any = None
        self.drawn_at = 0.0

    def start(
        self, options: dict[str, Any], history: list[dict[str, Any]], *, is_new: bool, weights: Path | None
    ) -> None:
        """Write the trainer's options, and the records of a resumed run; a new run sets an earlier run's files aside.

        Args:
            options: the trainer's options.
            history: the records of the epochs before.
            is_new: whether this is a new run.
            weights: where the run will write its weights.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if is_new:
                self._set_earlier_run_aside(weights)
        except OSError as error:
            raise StorageError(
                f"out_dir={str(self.path)!r} cannot be prepared: {error}; give a folder that is writable"
            ) from error
        self._write("trainer.yml", yaml.safe_dump(options, sort_keys=False, allow_unicode=True))
        self._write("metrics.jsonl", _json_lines(history))
        if is_new:
            self._write("log.txt", "")
        if self.tensorboard is False:
            return
        try:
            import_optional("tensorboard", "track")
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            if self.tensorboard:
                raise
        else:
            self.events = SummaryWriter(str(self.path))

    def _set_earlier_run_aside(self, weights: Path | None) -> None:
        """Move the files of an earlier run into a folder, so that they are neither lost nor taken for the new run's."""
        results = {file for pattern in RESULTS for file in self.path.glob(pattern)}
        if weights is not None and weights.is_file():
            weights, folder = weights.parent.resolve() / weights.name, self.path.resolve()
            if weights.is_relative_to(folder):
                results.add(self.path / weights.relative_to(folder))
        files = results.union(*map(self.path.glob, RECORDS))
        if not results:
            for file in files:  # of a run that has ended before its first checkpoint
                file.unlink()
            return
        stem = self.path / f"before-{time.strftime('%Y%m%d-%H%M%S')}"
        names = (stem if number == 1 else stem.with_name(f"{stem.name}-{number}") for number in itertools.count(1))
        aside = next(folder for folder in names if not folder.exists())
        for file in files:
            target = aside / file.relative_to(self.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.rename(target)
        logger.warning(
            "out_dir=%r held another run: its weights, checkpoints and records are in %s now. Give each run another folder, "
            "or resume=True to continue",
            str(self.path),
            aside,
        )

    def log(self, text: str) -> None:
        """Append lines to ``log.txt``."""
        path = self.path / "log.txt"
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(text + "\n")
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error}; free some space, or give another out_dir") from error

    def record(self, history: list[dict[str, Any]]) -> None:
        """Write the records of all epochs, and redraw the curves from time to time."""
        self._write("metrics.jsonl", _json_lines(history))
        if self.events is not None:
            latest = history[-1]
            for name, value in latest.items():
                if isinstance(value, (int, float)) and name not in ("epoch", "step"):
                    self.events.add_scalar(name, value, latest["step"])
        if time.perf_counter() - self.drawn_at > CURVES_INTERVAL_S and self.drawn_at:
            self.draw(history)
        self.drawn_at = self.drawn_at or time.perf_counter()

    def draw(self, history: list[dict[str, Any]]) -> None:
        """Draw the curves of the records."""
        if history:
            draw_curves(self.path / "plots" / "curves.png", history)
            self.drawn_at = time.perf_counter()

    def close(self) -> None:
        """Close the event file and its thread."""
        if self.events is not None:
            self.events.close()
            self.events = None

    def _write(self, name: str, content: str) -> None:
        with atomic_write(self.path / name) as file:
            file.write(content.encode(errors="backslashreplace"))  # a text may hold half a character


def _json_lines(history: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(map_leaves(_to_json, record), ensure_ascii=False) + "\n" for record in history)


def _to_json(leaf: Any) -> Any:
    """Return ``leaf`` in JSON's types: tensors become lists, and nan and infinity become ``null``."""
    if isinstance(leaf, torch.Tensor):
        return map_leaves(_to_json, leaf.tolist())
    return None if isinstance(leaf, float) and not math.isfinite(leaf) else leaf
