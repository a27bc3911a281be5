"""Folder of one recipe run: its files, its creation, and the trainer's options for it."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from torch import nn

from duoka import checkpoint
from duoka.errors import ConfigError, DataError, DivergenceError, StorageError, TrainingInterrupted
from duoka.launcher import launch
from duoka.log import logger
from duoka.trainer import Callback, FitResult, State, Trainer
from duoka.trainer.callbacks import TIME_IS_OVER
from duoka.utils.files import atomic_write, is_file, safe_name, safe_names, write_time_ns
from duoka.utils.schema import read_json
from duoka.utils.text import duoka_command, format_bytes
from duoka.utils.yaml_file import read_yaml
from duoka.world import current_world

T = TypeVar("T")
DATA = "data.json"
"""File of a run that describes its data."""
OUT_OF_TIME = 124
"""Exit status at the time limit, as that of the command ``timeout``."""
AS_IN_TRAINER = ("keep_checkpoints", "on_nonfinite_loss", "find_nonfinite_layer", "on_out_of_memory")
"""Options of every recipe that the trainer has under the same name."""
_LONGEST = 60
"""Largest number of characters of a value in a message."""


def config_text(recipe: str, config: Any) -> str:
    """Return every option of the dataclass ``config`` as YAML, which ``duoka train RECIPE -c`` reads."""
    options = {"recipe": recipe, **dataclasses.asdict(config)}
    return str(yaml.safe_dump(options, sort_keys=False, allow_unicode=True))


@dataclass(frozen=True)
class RecipeRun:
    """The folder of one training run."""

    folder: Path
    created: tuple[Path, ...] = ()
    """The folder if this process has created it, and then the parents that it created, each before its own parent."""

    @classmethod
    def new(cls, out: str | Path, recipe: str, name: str) -> RecipeRun:
        """Create ``out/recipe/<time>-name``, with a number where another run has that name.

        Raises StorageError if the folder cannot be created.
        """
        stem = Path(out) / recipe / f"{time.strftime('%Y%m%d-%H%M%S')}-{safe_name(name)}"
        absent = [parent for parent in stem.parents if not parent.exists()]
        for number in itertools.count(1):
            folder = stem if number == 1 else stem.with_name(f"{stem.name}-{number}")
            try:
                folder.mkdir(parents=True)
                break
            except OSError as error:
                if isinstance(error, FileExistsError) and folder.is_dir():
                    continue  # another run of this second
                files = [place for place in (*folder.parents, folder) if place.is_file()]
                reason = f"{files[-1]} is a file" if files else error.strerror or str(error)
                raise StorageError(
                    f"cannot create the run's folder {folder}: {reason}: choose another --out"
                ) from error
        return cls(folder, (folder, *absent))

    @classmethod
    def at(cls, folder: str | Path) -> RecipeRun:
        """Return the run in ``folder``. Raises DataError if there is none."""
        path = Path(folder)
        if not is_file(path / "config.yml"):
            raise DataError(f"no run at {path}: {_what_there_is(path)}")
        return cls(path)

    @property
    def config(self) -> Path:
        """File of all options, resolved: ``duoka train RECIPE -c`` repeats the run."""
        return self.folder / "config.yml"

    @property
    def model(self) -> Path:
        """File of the trained weights."""
        return self.folder / "model.safetensors"

    @property
    def plots(self) -> Path:
        """Folder of pictures."""
        return self.folder / "plots"

    def samples(self, classes: Sequence[str]) -> list[Path]:
        """Return the file of each class for an image of it, to try the model with."""
        return [self.folder / "samples" / f"{name}.png" for name in safe_names(classes)]

    def log(self, text: str) -> None:
        """Add a line to ``log.txt``."""
        path = self.folder / "log.txt"
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(f"{text}\n")
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error}") from error

    def recipe(self) -> str:
        """Return the name of the recipe that made the run."""
        name = read_yaml(self.config).get("recipe")
        if not isinstance(name, str):
            raise ConfigError(f"{self.config} does not say which recipe made the run: add the line `recipe: NAME`")
        return name

    def _resume_command(self) -> str:
        recipe = "RECIPE"
        with contextlib.suppress(ConfigError):  # its file of options is damaged, too
            recipe = self.recipe()
        return duoka_command("train", recipe, "--resume", self.folder)

    def finished_model(self) -> Path:
        """Return the trained weights' file. Raises DataError if the run is not finished."""
        if not self.model.is_file():
            raise DataError(
                f"the run {self.folder} has no {self.model.name}: it was stopped; finish it with `{self._resume_command()}`"
            )
        return self.model

    def build_finished_model(self, build: Callable[[], nn.Module]) -> nn.Module:
        """Return the model that ``build`` makes, with the trained weights.

        Raises DataError if the run is not finished, or its options make a model much larger than the file of weights:
        such options were changed by hand.
        """
        path = self.finished_model()
        with torch.device("meta"):  # a model without memory
            needed = sum(parameter.numel() * parameter.element_size() for parameter in build().parameters())
        if needed > 4 * (found := path.stat().st_size):  # the file may have a narrower number format
            raise DataError(
                f"the options in {self.config} make a model of {format_bytes(needed)}, and {path.name} has "
                f"{format_bytes(found)}: restore the file of options, or train a new run"
            )
        return checkpoint.load(path, build())

    def write_results(self, results: Any, name: str = "results.json") -> None:
        """Write results as JSON on rank 0."""
        self.write_text(name, json.dumps(results, indent=2, ensure_ascii=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a text file on rank 0, whole or not at all."""
        if not current_world().is_main:
            return
        with atomic_write(self.folder / name) as file:
            file.write(text.encode())

    def read_results(self, form: type[T]) -> T:
        """Return what ``write_results`` wrote.

        Raises DataError if the file is missing or damaged, or has another ``form``, a ``TypedDict`` class.
        """
        return read_json(self.folder / "results.json", form, f"`{self._resume_command()}` writes it anew")


@dataclass(eq=False)
class ConfigWriter(Callback):
    """Writes a run's ``config.yml`` when training begins, so that a refused checkpoint leaves the old file."""

    run: RecipeRun
    recipe: str
    config: Any
    facts: dict[str, Any] | None = None

    def on_fit_start(self, state: State) -> None:  # noqa: ARG002
        """Write the options, and a description of the data that ``refuse_other_data`` reads."""
        self.run.write_text("config.yml", config_text(self.recipe, self.config.with_absolute_paths()))
        if self.facts is not None:
            self.run.write_results(self.facts, DATA)


@contextlib.contextmanager
def recipe_run(recipe: str, config: Any, facts: dict[str, Any] | None = None, source: str = "") -> Iterator[RecipeRun]:
    """Yield the folder of ``config``'s run, the same on every rank of a cluster job; rank 0 creates it if it is new.

    A resumed run must have begun with the same ``facts`` about the data of ``source``. If the block fails, or is
    interrupted, before it has written anything, the folder is removed. Later, the log has the command that continues the
    run; after a divergence, which that would repeat, the command of a new run.
    """
    run = launch(_run_dir_on_rank_zero, recipe, config, devices=config.device)
    assert run is not None  # rank 0 returns it
    if config.resume and facts is not None:
        refuse_other_data(run, facts, source)
    if config.resume and current_world().is_main and not any(run.folder.rglob("checkpoint/*.pt")):
        logger.warning("%s has no checkpoint: training begins at the first epoch", run.folder)
    written = write_time_ns(run.config)
    try:
        yield run
    except BaseException as error:
        for folder in run.created:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()
        if current_world().is_main and write_time_ns(run.config) not in (None, written):  # training has begun
            if isinstance(error, DivergenceError):
                command = duoka_command("train", recipe, "-c", run.config, "--lr", "LOWER")
                logger.warning("stopped; --resume would diverge again. Begin a new run with a lower lr: %s", command)
            else:
                logger.warning("stopped; continue with: %s", duoka_command("train", recipe, "--resume", run.folder))
        raise


def _run_dir_on_rank_zero(recipe: str, config: Any) -> RecipeRun | None:
    if not current_world().is_main:
        return None
    return RecipeRun.at(config.resume) if config.resume else RecipeRun.new(config.out, recipe, config.name)


def run_options(run: RecipeRun, recipe: str, config: Any, facts: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the trainer's options for the run's folder; ``facts`` describe the data, for ``refuse_other_data``."""
    return {
        "out_dir": run.folder,
        "resume": "auto",  # a new folder has no checkpoint
        "checkpoint_minutes": config.checkpoint_minutes,
        "checkpoint_every_steps": config.checkpoint_every_steps or None,
        "micro_batch_size": config.micro_batch_size or None,
        **{name: getattr(config, name) for name in AS_IN_TRAINER},
        "max_hours": _hours_left(config.hours) if config.hours else None,
        "callbacks": [ConfigWriter(run, recipe, dataclasses.replace(config, resume=None), facts)],
    }


def _hours_left(hours: float) -> float:
    """Return what is left of ``hours`` since the process began; never 0."""
    import psutil

    return max(hours - (time.time() - psutil.Process().create_time()) / 3600, 1e-9)


def fit(trainer: Trainer, **options: Any) -> FitResult:
    """Train with ``trainer.fit(**options)``.

    Raises TrainingInterrupted if the time limit has ended training: what follows it needs a finished model.
    """
    result = trainer.fit(**options)
    if trainer.stopped == TIME_IS_OVER:
        raise TrainingInterrupted("the time limit, --hours, is over", OUT_OF_TIME)
    return result


def refuse_other_data(run: RecipeRun, facts: dict[str, Any], source: str) -> None:
    """Refuse to use ``run`` with the data of ``source`` if they differ, except for rounding, from its training data.

    Raises DataError with the value that differs, then and now.
    """
    path = run.folder / DATA
    if not path.exists():
        return
    before = read_json(path, dict[str, Any], "train a new run")
    for name, now in facts.items():
        if not _alike(was := before.get(name), now):
            raise DataError(
                f"{source} differs from the data that the run {run.folder} began with: {name} is {_short(now)} now and was "
                f"{_short(was)}; give the same data as then, or train a new run with these"
            )


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6)
    return bool(one == other)


def _short(value: Any) -> str:
    if isinstance(value, list | tuple):
        text = ", ".join(f"{one:.4g}" if isinstance(one, float) else str(one) for one in value)
    else:
        text = str(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 4]} ..."


def _what_there_is(path: Path) -> str:
    """Return what is at ``path`` instead of a run, and what to do."""
    name_one = "give a folder that `duoka train` has named"
    if is_file(path):
        runs = [folder for folder in path.absolute().parents if (folder / "config.yml").is_file()]
        return f"it is a file of the run {runs[0]}: give that folder" if runs else "it is a file; give a run's folder"
    if not os.path.isdir(path):  # noqa: PTH112 - Path's method raises for a name that is too long
        return f"the folder does not exist; {name_one}"
    if (path / "trainer.yml").is_file():
        return (
            "the folder is of a Trainer of your own, and only `duoka train` saves model and data with a run; load the "
            "weights in your script with duoka.load, and call Trainer.evaluate or Trainer.predict there"
        )
    if not any(path.iterdir()):
        return "the folder is empty: the run was stopped before it began; start it again"
    return f"the folder holds no config.yml; {name_one}"
