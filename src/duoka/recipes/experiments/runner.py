"""Training of all trials of an experiment: finished trials are skipped, interrupted ones resume, failures stay alone."""

from collections.abc import Callable, Sequence
from typing import Any

from duoka.devices import resolve
from duoka.errors import ConfigError
from duoka.recipes.common import registry
from duoka.recipes.experiments.experiment_spec import ExperimentSpec, Trial
from duoka.recipes.experiments.parallel_runner import run_parallel
from duoka.recipes.experiments.trial_run import finished_run, read_history, run_trial


def run_all(
    spec: ExperimentSpec, *, parallel: bool = False, report: Callable[[str], None] = lambda _: None
) -> dict[str, str]:
    """Train every unfinished trial of ``spec``; return the failed ones by title, with the reason.

    Args:
        spec: the result of ``read_experiment``.
        parallel: whether each device trains another trial, in a worker process, instead of all devices the same trial.
        report: called with a line of text for each trial that starts, fails, or is skipped.

    Raises DuokaError if a device does not exist or data cannot be read, before any training; or if no run has
    ``spec.metric``.
    """
    _check_metric(spec)
    waiting = []
    for trial in spec.trials:
        if finished_run(trial) is None:
            waiting.append(trial)
        else:
            report(f"{trial.title}: finished, skipped")
    _check_devices_and_data(waiting)
    if parallel:
        return run_parallel(waiting, report)
    failed = {}
    for number, trial in enumerate(waiting, 1):
        report(f"{trial.title}: {number} of {len(waiting)}")
        if error := run_trial(trial):
            report(f"{trial.title}: failed: {error}")
            failed[trial.title] = error
        else:
            _check_metric(spec)
    return failed


def _check_metric(spec: ExperimentSpec) -> None:
    records = [record for trial in spec.trials for record in read_history(trial)]
    names = {key.removeprefix("val_") for record in records for key in record if key.startswith("val_")}
    if names and spec.metric not in names:
        raise ConfigError(
            f"metric={spec.metric!r} is not valid: evaluations have {', '.join(sorted(names))}. Change it and start again; "
            "finished runs are kept"
        )


def _check_devices_and_data(trials: Sequence[Trial]) -> None:
    """Raise for missing devices or data before anything is written; read data that trials share once."""
    checked: list[dict[str, Any]] = []
    for trial in trials:
        config, load = trial.config(), getattr(registry.find_recipe(trial.recipe), "load", None)
        resolve(config.device)
        options = {key: getattr(config, key) for key in getattr(config, "DATA", ())}
        if load is not None and options not in checked:
            checked.append(options)
            load(config)
