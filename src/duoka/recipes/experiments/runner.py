"""Trials trained: what is finished is skipped, what was stopped goes on, and what fails leaves the others alone."""

from __future__ import annotations

import dataclasses
import json
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import yaml

from duoka import devices
from duoka.errors import ConfigError, DataError, DuokaError
from duoka.recipes.common import registry
from duoka.recipes.common.recipe_run import RecipeRun
from duoka.recipes.experiments.experiment_spec import OURS, ExperimentSpec, Variant
from duoka.recipes.experiments.parallel_runner import side_by_side

__all__ = ["check_metric", "finished", "history", "run_all", "run_one"]

Say = Callable[[str], None]
CARRIED = ("device", "num_workers", "root", "download")
"""Options that may change from one start to the next: they say where and by whom, not what."""


def run_all(plan: ExperimentSpec, *, parallel: bool = False, say: Say = lambda _: None) -> dict[str, str]:
    """Train every trial of ``plan`` that is not finished; return what failed, by title, with the reason.

    Args:
        plan: what ``read_plan`` returned.
        parallel: whether each device trains a trial of its own, in a process of its own, instead of all one trial.
        say: is told what begins, and what is skipped.

    Raises:
        DuokaError: a device is not there or data cannot be read, before anything is trained; or no run has ``plan.metric``.

    """
    check_metric(plan)
    waiting = []
    for trial in plan.trials:
        if finished(trial) is None:
            waiting.append(trial)
        else:
            say(f"{trial.title}: finished, skipped")
    _check_devices_and_data(waiting)
    if parallel:
        return side_by_side(waiting, say)
    failed = {}
    for number, trial in enumerate(waiting, 1):
        say(f"{trial.title}: {number} of {len(waiting)}")
        error = run_one(trial)
        if error:
            say(f"{trial.title}: failed: {error}")
            failed[trial.title] = error
        else:
            check_metric(plan)
    return failed


def check_metric(plan: ExperimentSpec) -> None:
    """Refuse a metric that finished runs do not have: only these tell which there are.

    Raises:
        ConfigError: it is none of theirs.

    """
    records = [record for trial in plan.trials for record in history(trial)]
    names = {key.removeprefix("val_") for record in records for key in record if key.startswith("val_")}
    if names and plan.metric not in names:
        raise ConfigError(
            f"`metric` is {plan.metric!r}, which no evaluation has: there is {', '.join(sorted(names))}. Change it and start "
            "again: what is finished is not repeated"
        )


def _check_devices_and_data(trials: Sequence[Variant]) -> None:
    """Say what is missing before anything is written; data that trials share are read once."""
    seen: list[dict[str, Any]] = []
    for trial in trials:
        config, load = trial.config(), getattr(registry.find(trial.recipe), "load", None)
        devices.resolve(config.device)
        options = {key: getattr(config, key) for key in getattr(config, "DATA", ())}
        if load is not None and options not in seen:
            seen.append(options)
            load(config)


def history(trial: Variant) -> list[dict[str, Any]]:
    """Return what a finished run wrote after each epoch; nothing of another."""
    run = finished(trial)
    path = None if run is None else run.folder / "metrics.jsonl"
    return (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path and path.is_file() else []
    )


def finished(trial: Variant) -> RecipeRun | None:
    """Return the trial's run if it has come to its end with these very options."""
    run = _latest(trial)
    if run is None or not run.model.is_file() or _noted(trial) != _kept(trial):
        return None
    try:
        run.read_results()
    except DataError:
        return None
    return run


def run_one(trial: Variant, **changes: Any) -> str:
    """Train one trial, or go on with it; return why it failed, or nothing."""
    error = trial.folder / "error.txt"
    error.unlink(missing_ok=True)
    if _noted(trial) not in (None, _kept(trial)):
        trial.folder.rename(trial.folder.with_name(f"{trial.folder.name}-before-{time.strftime('%Y%m%d-%H%M%S')}"))
    trial.folder.mkdir(parents=True, exist_ok=True)
    part = trial.folder / ".options.yml.part"
    part.write_text(yaml.safe_dump(_kept(trial)), encoding="utf-8")
    part.replace(trial.folder / "options.yml")  # a kill leaves the old one or the new one
    stopped = _latest(trial)
    try:
        where = {"out": str(trial.folder), "resume": str(stopped.folder) if stopped else None, **changes}
        registry.find(trial.recipe).train(trial.config(**where))
    except Exception as failure:  # a variant's own, whatever it is: the others go on
        lines = str(failure).strip().splitlines() or [""]
        line = lines[0] if isinstance(failure, DuokaError) else f"{type(failure).__name__}: {lines[0]}"
        error.write_text(f"{line}\n\n{traceback.format_exc()}", encoding="utf-8")
        return line
    return ""


def _latest(trial: Variant) -> RecipeRun | None:
    """Return the last run of the trial that had begun."""
    found = sorted((trial.folder / trial.recipe).glob("*/config.yml"))
    return RecipeRun(found[-1].parent) if found else None


def _kept(trial: Variant) -> dict[str, Any]:
    """Return what makes another experiment when it changes."""
    options = dataclasses.asdict(trial.config())
    return {key: value for key, value in options.items() if key not in (*CARRIED, *OURS) or key == "seed"}


def _noted(trial: Variant) -> Any:
    """Return what ``_kept`` was when the trial began; ``None`` if it has not. An option that is new since has its default."""
    path = trial.folder / "options.yml"
    if not path.is_file():
        return None
    noted = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    now = _kept(trial)
    new = {field.name: field.default for field in dataclasses.fields(trial.config()) if field.name in now}
    return {**new, **noted}
