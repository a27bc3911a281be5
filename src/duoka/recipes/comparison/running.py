"""Trials trained: what is finished is skipped, what was stopped goes on, and what fails leaves the others alone."""

from __future__ import annotations

import dataclasses
import os
import pickle
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
import yaml

from duoka import devices, scaling
from duoka.errors import ConfigError, DataError, DuokaError
from duoka.recipes import registry
from duoka.recipes.comparison.plan import OURS, Plan, Trial
from duoka.recipes.runs import Run

__all__ = ["finished", "run_all", "run_one"]

Say = Callable[[str], None]
CARRIED = ("device", "workers", "root", "download")
"""Options that may change from one start to the next: they say where and by whom, not what."""


def run_all(plan: Plan, *, parallel: bool = False, say: Say = lambda _: None) -> dict[str, str]:
    """Train every trial of ``plan`` that is not finished; return what failed, by title, with the reason.

    Args:
        plan: what ``read_plan`` returned.
        parallel: whether each device trains a trial of its own, in a process of its own, instead of all one trial.
        say: is told what begins, and what is skipped.

    """
    waiting = []
    for trial in plan.trials:
        if finished(trial) is None:
            waiting.append(trial)
        else:
            say(f"{trial.title}: finished, skipped")
    if parallel:
        return _side_by_side(waiting, say)
    failed = {}
    for number, trial in enumerate(waiting, 1):
        say(f"{trial.title}: {number} of {len(waiting)}")
        error = run_one(trial)
        if error:
            say(f"{trial.title}: failed: {error}")
            failed[trial.title] = error
    return failed


def finished(trial: Trial) -> Run | None:
    """Return the trial's run if it has come to its end with these very options."""
    run = _latest(trial)
    if run is None or not run.model.is_file() or _noted(trial) != _kept(trial):
        return None
    try:
        run.read_results()
    except DataError:
        return None
    return run


def run_one(trial: Trial, **changes: Any) -> str:
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
        error.write_text(traceback.format_exc(), encoding="utf-8")
        lines = str(failure).splitlines() or [type(failure).__name__]
        return lines[0] if isinstance(failure, DuokaError) else f"{type(failure).__name__}: {lines[0]}"
    return ""


def _latest(trial: Trial) -> Run | None:
    """Return the last run of the trial that had begun."""
    found = sorted((trial.folder / trial.recipe).glob("*/config.yml"))
    return Run(found[-1].parent) if found else None


def _kept(trial: Trial) -> dict[str, Any]:
    """Return what makes another experiment when it changes."""
    options = dataclasses.asdict(trial.config())
    return {key: value for key, value in options.items() if key not in (*CARRIED, *OURS) or key == "seed"}


def _noted(trial: Trial) -> Any:
    """Return what ``_kept`` was when the trial began; ``None`` if it has not. An option that is new since has its default."""
    path = trial.folder / "options.yml"
    if not path.is_file():
        return None
    noted = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    now = _kept(trial)
    new = {field.name: field.default for field in dataclasses.fields(trial.config()) if field.name in now}
    return {**new, **noted}


def _side_by_side(trials: Sequence[Trial], say: Say) -> dict[str, str]:
    """Train as many trials at once as there are devices."""
    specs = {str(trial.options.get("device", "auto")) for trial in trials}
    if len(specs) > 1:
        raise ConfigError(
            f"--parallel gives each variant a device of its own, and they name {', '.join(specs)}: name one list"
        )
    chosen = devices.resolve(specs.pop()).devices if specs else ()
    free: SimpleQueue[str] = SimpleQueue()
    for device in chosen:
        free.put(str(device))
    threads = max(1, scaling.core_limits().count // max(1, len(chosen)))

    def train(trial: Trial) -> tuple[str, str]:
        device = free.get()
        try:
            say(f"{trial.title}: on {device}, output in {trial.folder / 'output.txt'}")
            return trial.title, _in_a_process(trial, device, threads)
        finally:
            free.put(device)

    with ThreadPoolExecutor(max(1, len(chosen))) as pool:
        failed = dict(pool.map(train, trials))
    for title, error in failed.items():
        if error:
            say(f"{title}: failed: {error}")
    return {title: error for title, error in failed.items() if error}


def _in_a_process(trial: Trial, device: str, threads: int) -> str:
    """Train ``trial`` in a process that ends when this one does, however it does; return why it failed, or nothing."""
    trial.folder.parent.mkdir(parents=True, exist_ok=True)
    name = trial.folder.with_name(f".{trial.folder.name}.output")
    command = [sys.executable, "-m", "duoka.recipes.comparison.process"]
    environment = (
        {**os.environ, "OMP_NUM_THREADS": str(threads)} if torch.device(device).type == "cpu" else dict(os.environ)
    )
    with name.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, stderr=output, env=environment)
        assert process.stdin is not None
        with process, process.stdin:
            try:
                pickle.dump((trial, device), process.stdin)
                process.stdin.flush()
                status = process.wait()
            except BaseException:
                process.kill()
                raise
    trial.folder.mkdir(parents=True, exist_ok=True)
    name.replace(trial.folder / "output.txt")
    error: Path = trial.folder / "error.txt"
    if error.is_file():
        return error.read_text(encoding="utf-8").strip().splitlines()[-1]
    return "" if status == 0 else f"its process ended with status {status}: see {trial.folder / 'output.txt'}"
