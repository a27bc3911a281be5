"""The training run of one trial on disk: start, resume, skip if finished, and the reason of a failure."""

import contextlib
import time
import traceback
from typing import Any, TypedDict

from duoka.errors import DataError, DuokaError
from duoka.recipes.common import registry
from duoka.recipes.common.config import HOW_IT_RUNS, has_options_of
from duoka.recipes.common.recipe_run import RecipeRun
from duoka.recipes.experiments.experiment_spec import RESERVED_KEYS, Trial
from duoka.utils.schema import parse_json, read_text
from duoka.utils.text import first_line

_NOT_COMPARED = (*HOW_IT_RUNS, "root", *(key for key in RESERVED_KEYS if key != "seed"))
"""Options that may change between two starts of the same trial: they do not change its result."""


class _EpochRecord(TypedDict):
    """What a comparison reads of a line of ``metrics.jsonl``, beside the results of evaluations."""

    epoch: int
    seconds: float
    samples_per_s: float


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
    run = _latest_run(trial)
    if run is not None and not _has_options_of(trial, run):
        trial.folder.rename(trial.folder.with_name(f"{trial.folder.name}-before-{time.strftime('%Y%m%d-%H%M%S')}"))
    trial.folder.mkdir(parents=True, exist_ok=True)


def finished_run(trial: Trial) -> RecipeRun | None:
    """Return the trial's run if it is complete and has the trial's options."""
    run = _latest_run(trial)
    if run is not None and run.model.is_file() and _has_options_of(trial, run):
        with contextlib.suppress(DataError):
            run.read_results(dict[str, Any])
            return run
    return None


def read_history(trial: Trial) -> list[dict[str, Any]]:
    """Return the metrics of each epoch of a finished run; nothing for another."""
    run = finished_run(trial)
    path = run.folder / "metrics.jsonl" if run is not None else None
    if path is None or not path.exists():
        return []
    remedy = f"remove {trial.folder} to train it again"
    lines = read_text(path, remedy).splitlines()
    return [
        {**parse_json(line, _EpochRecord, f"{path}, line {number}", remedy)} for number, line in enumerate(lines, 1)
    ]


def _latest_run(trial: Trial) -> RecipeRun | None:
    found = sorted((trial.folder / trial.recipe).glob("*/config.yml"))
    return RecipeRun(found[-1].parent) if found else None


def _has_options_of(trial: Trial, run: RecipeRun) -> bool:
    """Return whether the run has the options that define the trial: another value makes it another experiment."""
    return has_options_of(run, trial.config(), without=_NOT_COMPARED)
