"""A run's folder: where it is made, what lies in it, and how it is found again."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from duoka.errors import ConfigError, DataError, StorageError
from duoka.launcher import launch
from duoka.log import logger
from duoka.trainer import Callback, State
from duoka.world import current_world

__all__ = ["DATA", "ConfigWriter", "RecipeRun", "folder_of", "no_empty_folder", "refuse_other_data", "run_options"]

DATA = "data.json"
"""The file of a run that says what its data are."""
SHORT = 60
"""Characters of a fact in a message."""

_made: list[Path] = []
"""The folders that were made within ``no_empty_folder``, each before the one that it is in."""


@contextlib.contextmanager
def no_empty_folder() -> Iterator[None]:
    """Where the block is interrupted or fails before anything was written, leave no empty run's folder behind."""
    _made.clear()
    try:
        yield
    except BaseException:
        for folder in _made:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()
        raise
    finally:
        _made.clear()


@dataclass(frozen=True)
class RecipeRun:
    """The folder of one training run."""

    folder: Path

    @classmethod
    def new(cls, out: str | Path, recipe: str, name: str) -> RecipeRun:
        """Make ``out/recipe/<time>-name``, a folder that nobody else has.

        Raises:
            StorageError: the folder cannot be made.

        """
        stem = Path(out) / recipe / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"
        number = 1
        absent = [parent for parent in stem.parents if not parent.exists()]
        while True:
            folder = stem if number == 1 else stem.with_name(f"{stem.name}-{number}")
            try:
                folder.mkdir(parents=True)
            except FileExistsError:
                if not folder.is_dir():
                    raise StorageError(_cannot_make(folder, "a file is in its place")) from None
                number += 1
            except OSError as error:
                raise StorageError(_cannot_make(folder, error.strerror or str(error))) from error
            else:
                _made.extend((folder, *absent))
                return cls(folder)

    @classmethod
    def at(cls, folder: str | Path) -> RecipeRun:
        """Return the run in ``folder``.

        Raises:
            DataError: there is no run.

        """
        path = Path(folder)
        if not (path / "config.yml").is_file():
            raise DataError(f"no run at {path}: {_what_there_is(path)}")
        return cls(path)

    @property
    def config(self) -> Path:
        """All options, as they were resolved: ``duoka train RECIPE -c`` repeats the run."""
        return self.folder / "config.yml"

    @property
    def model(self) -> Path:
        """The trained weights."""
        return self.folder / "model.safetensors"

    @property
    def plots(self) -> Path:
        """The folder of pictures."""
        return self.folder / "plots"

    def sample(self, name: str) -> Path:
        """Return the file of an image to try the model with, one of the class ``name``."""
        return self.folder / "samples" / f"{name}.png"

    def log(self, text: str) -> None:
        """Add a line to ``log.txt``."""
        path = self.folder / "log.txt"
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(f"{text}\n")
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error}") from error

    @contextlib.contextmanager
    def resumable(self, recipe: str) -> Iterator[None]:
        """Where the user interrupts the block, say how to go on."""
        try:
            yield
        except KeyboardInterrupt:
            if not self.config.is_file():
                raise  # it had not begun
            logger.warning("stopped; go on with: duoka train %s --resume %s", recipe, self.folder)
            raise

    def recipe(self) -> str:
        """Return the name of the recipe that made the run."""
        for line in self.config.read_text(encoding="utf-8").splitlines():
            if line.startswith("recipe:"):
                return line.partition(":")[2].strip()
        raise ConfigError(f"{self.config} does not say which recipe made the run: add the line `recipe: NAME`")

    def finished_model(self) -> Path:
        """Return the trained weights' file.

        Raises:
            DataError: the run has not come to its end.

        """
        if not self.model.is_file():
            remedy = f"finish it with `duoka train {self.recipe()} --resume {self.folder}`"
            raise DataError(f"the run {self.folder} has no {self.model.name}, it was stopped: {remedy}")
        return self.model

    def write_config(self, recipe: str, config: Any) -> None:
        """Write every option of the dataclass ``config``."""
        options = {"recipe": recipe, **dataclasses.asdict(config)}
        self._write("config.yml", yaml.safe_dump(options, sort_keys=False, allow_unicode=True))

    def write_results(self, results: Any, name: str = "results.json") -> None:
        """Write what the run came to."""
        self._write(name, json.dumps(results, indent=2, ensure_ascii=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a page for people."""
        self._write(name, text)

    def read_results(self, *needed: str) -> dict[str, Any]:
        """Return what ``write_results`` wrote.

        Raises:
            DataError: it is not there, damaged, or lacks one of the entries ``needed``.

        """
        path = self.folder / "results.json"
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            remedy = f"`duoka train {self.recipe()} --resume {self.folder}` writes it"
            raise DataError(f"cannot read {path}: {error}: {remedy}") from error
        if not isinstance(results, dict):
            raise DataError(f"{path} holds a {type(results).__name__}, not the results of a run")
        if missing := [name for name in needed if name not in results]:
            remedy = f"`duoka train {self.recipe()} --resume {self.folder}` writes it anew"
            raise DataError(f"{path} lacks {', '.join(missing)}: {remedy}")
        return results

    def _write(self, name: str, text: str) -> None:
        """Write a small file so that a reader sees all of it or none."""
        part = self.folder / f".{name}.part"
        try:
            with part.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            part.replace(self.folder / name)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise StorageError(f"cannot write {self.folder / name}: {error}") from error


class ConfigWriter(Callback):
    """Writes a run's ``config.yml`` when its training begins: a checkpoint that was refused leaves the one that fits it."""

    def __init__(self, run: RecipeRun, recipe: str, config: Any, facts: dict[str, Any] | None = None) -> None:
        self.run, self.recipe, self.config, self.facts = run, recipe, config, facts

    def on_fit_start(self, state: State) -> None:  # noqa: ARG002
        """Write it, and what the data are, so that the run does not go on with others."""
        self.run.write_config(self.recipe, self.config)
        if self.facts is not None:
            self.run.write_results(self.facts, DATA)


def folder_of(recipe: str, config: Any, devices: str | Sequence[torch.device]) -> RecipeRun:
    """Return the folder of ``config``'s run, the same for every rank of a job that others started; made if it is new.

    ``config`` has ``resume``, ``out`` and ``name``.
    """
    run = launch(_folder_on_main, recipe, config, devices=devices if isinstance(devices, str) else list(devices))
    assert run is not None  # rank 0 has made it
    return run


def _folder_on_main(recipe: str, config: Any) -> RecipeRun | None:
    if not current_world().is_main:
        return None
    return RecipeRun.at(config.resume) if config.resume else RecipeRun.new(config.out, recipe, config.name)


def run_options(run: RecipeRun, recipe: str, config: Any, facts: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the trainer's options for the run's folder; its configuration is written when a checkpoint was accepted.

    ``facts`` are what the data are, for ``refuse_other_data``.
    """
    if config.resume and not (run.folder / "checkpoint" / "last.pt").exists() and current_world().is_main:
        logger.warning("%s was stopped before anything was saved: it begins at its first epoch", run.folder)
    return {
        "out_dir": run.folder,
        "resume": "auto" if config.resume else False,
        "callbacks": [ConfigWriter(run, recipe, dataclasses.replace(config, resume=None), facts)],
    }


def refuse_other_data(run: RecipeRun, facts: dict[str, Any], source: str) -> None:
    """Refuse to go on with ``run`` where ``source`` has other ``facts`` than the run began with, but for rounding.

    Raises:
        DataError: the fact that differs, then and now.

    """
    path = run.folder / DATA
    if not path.is_file():
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    for name, now in facts.items():
        if not _alike(before.get(name), now):
            raise DataError(
                f"{source} is not what the run {run.folder} began with: its {name} now {_short(now)}, then "
                f"{_short(before.get(name))}; weights that have learnt from the one cannot be tested on the other: give the "
                "file of then, or begin a new run without --resume"
            )


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6)
    return bool(one == other)


def _short(value: Any) -> str:
    text = ", ".join(f"{one:.4g}" for one in value) if isinstance(value, list | tuple) else str(value)
    return text if len(text) <= SHORT else f"{text[: SHORT - 4]} ..."


def _cannot_make(folder: Path, why: str) -> str:
    """Say that a run's folder cannot be made; a file in the way is named."""
    for place in (*folder.parents, folder):
        if place.is_file():
            why = f"{place} is a file"
    return f"cannot make the run's folder {folder}: {why}: choose another --out"


def _what_there_is(path: Path) -> str:
    """Say what is in the place of a run, and what to do."""
    if path.is_file():
        runs = [folder for folder in path.absolute().parents if (folder / "config.yml").is_file()]
        return f"it is a file of the run {runs[0]}: give that folder" if runs else "it is a file; give a run's folder"
    if not path.is_dir():
        return "the folder is not there; give a folder that `duoka train` has named"
    if (path / "trainer.yml").is_file():
        return (
            "the folder is of a Trainer of your own, not of `duoka train`, which alone knows model and data; load the "
            "weights in your script with duoka.load, and call Trainer.evaluate or Trainer.predict there"
        )
    if not any(path.iterdir()):
        return "the folder is empty, as the run was stopped before it began; start it again"
    return "the folder holds no config.yml; give a folder that `duoka train` has named"
