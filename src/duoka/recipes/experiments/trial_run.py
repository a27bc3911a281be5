"""The training run of one trial on disk: start, resume, skip if finished, and the reason of a failure."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
import traceback
from typing import Any

import yaml

from duoka.errors import DataError, DuokaError
from duoka.recipes.common import registry
from duoka.recipes.common.recipe_run import RecipeRun
from duoka.recipes.experiments.experiment_spec import RESERVED_KEYS, Trial
from duoka.utils.files import atomic_write
from duoka.utils.text import first_line

_NOT_COMPARED = ("device", "num_workers", "root", "download", *(key for key in RESERVED_KEYS if key != "seed"))
"""Options that may change between two starts of the same trial: they do not change its result."""


def run_trial(trial: Trial, **changes: Any) -> str:
    """Train one trial, or resume it; return the reason of a failure, or ``""``."""
    prepare_folder(trial)
    error_file = trial.folder / "error.txt"
    error_file.unlink(missing_ok=True)
    interrupted = _latest_run(trial)
    try:
        where = {"out": str(trial.folder), "resume": str(interrupted.folder) if interrupted else None}
        registry.find_recipe(trial.recipe).train(trial.config(**where, **changes))
    except Exception as error:  # of any kind: the other trials continue
        reason = first_line(error) if isinstance(error, DuokaError) else f"{type(error).__name__}: {first_line(error)}"
        error_file.write_text(f"{reason}\n\n{traceback.format_exc()}", encoding="utf-8")
        return reason
    return ""


def prepare_folder(trial: Trial) -> None:
    """Create the trial's folder; one that holds a run with other options gets another name."""
    options = _options(trial)
    if _recorded_options(trial) not in (None, options):
        trial.folder.rename(trial.folder.with_name(f"{trial.folder.name}-before-{time.strftime('%Y%m%d-%H%M%S')}"))
    with atomic_write(trial.folder / "options.yml") as file:
        file.write(yaml.safe_dump(options).encode())


def finished_run(trial: Trial) -> RecipeRun | None:
    """Return the trial's run if it is complete and has the trial's options."""
    run = _latest_run(trial)
    if run is not None and run.model.is_file() and _recorded_options(trial) == _options(trial):
        with contextlib.suppress(DataError):
            run.read_results()
            return run
    return None


def read_history(trial: Trial) -> list[dict[str, Any]]:
    """Return the metrics of each epoch of a finished run; nothing for another."""
    run = finished_run(trial)
    path = run.folder / "metrics.jsonl" if run is not None else None
    if path is None or not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _latest_run(trial: Trial) -> RecipeRun | None:
    found = sorted((trial.folder / trial.recipe).glob("*/config.yml"))
    return RecipeRun(found[-1].parent) if found else None


def _options(trial: Trial) -> dict[str, Any]:
    """Return the options that define the experiment: another value makes it another experiment."""
    options = dataclasses.asdict(trial.config())
    return {key: value for key, value in options.items() if key not in _NOT_COMPARED}


def _recorded_options(trial: Trial) -> Any:
    """Return the options with which the trial started, with defaults for newer options; ``None`` if it never started."""
    path = trial.folder / "options.yml"
    if not path.is_file():
        return None
    recorded = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    current = _options(trial)
    defaults = {field.name: field.default for field in dataclasses.fields(trial.config()) if field.name in current}
    return {**defaults, **recorded}
