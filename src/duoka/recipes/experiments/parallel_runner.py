"""Trials trained in parallel: one worker process on each device, with one trial at a time."""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from duoka.devices.cpu import threads_per_rank
from duoka.devices.selection import resolve
from duoka.errors import ConfigError, WorkerDied
from duoka.malloc import keep_freed_memory
from duoka.recipes.experiments.experiment_spec import Trial
from duoka.recipes.experiments.trial_run import prepare_folder, run_trial
from duoka.utils.text import first_line
from duoka.workers import WorkerChannel, WorkerSession
from duoka.workers.serialization import dumps, loads


def run_parallel(trials: Sequence[Trial], report: Callable[[str], None]) -> dict[str, str]:
    """Train as many trials at once as there are devices; return the failed ones by title, with the reason.

    Raises ConfigError if the trials name different devices.
    """
    specs = {str(trial.options.get("device", "auto")) for trial in trials}
    if len(specs) > 1:
        raise ConfigError(
            f"--parallel trains each variant on one device, but variants name {', '.join(sorted(specs))}. "
            "Name one list of devices for all"
        )
    devices = resolve(specs.pop()).devices if specs else ()
    return _TrialWorkers(trials, devices, report).run() if devices else {}


class _TrialWorkers:
    """A worker process for each trial, at most one a device at a time."""

    def __init__(self, trials: Sequence[Trial], devices: Sequence[torch.device], report: Callable[[str], None]) -> None:
        self._trials, self._devices, self._report = trials, devices, report
        self._waiting = iter(trials)
        self._errors: dict[str, str] = {}
        self._lock = threading.Lock()
        self._sessions: list[WorkerSession] = []
        self._stopped = False

    def run(self) -> dict[str, str]:
        """Train all trials; on Ctrl-C end those that run, and start no other."""
        with ThreadPoolExecutor(len(self._devices)) as executor:
            try:
                list(executor.map(self._train_waiting, self._devices))
            except BaseException:
                with self._lock:
                    self._stopped = True
                    for session in self._sessions:
                        session.workers[0].kill()  # its thread then sees the death and closes the session
                raise
        return {trial.title: self._errors[trial.title] for trial in self._trials if trial.title in self._errors}

    def _train_waiting(self, device: torch.device) -> None:
        try:
            for trial in self._waiting:  # an iterator that the threads of all devices share
                error = "" if self._stopped else self._run_in_worker(trial, device)
                if error and not self._stopped:
                    self._errors[trial.title] = error
                    self._report(f"{trial.title}: failed: {error}")
        except BaseException:  # a process that cannot start, for example
            self._stopped = True  # so that no other device starts another trial
            raise

    def _run_in_worker(self, trial: Trial, device: torch.device) -> str:
        output = trial.folder / "output.txt"
        self._report(f"{trial.title}: on {device}, output in {output}")
        threads = threads_per_rank(len(self._devices))
        session = WorkerSession(_train_trial, [device], (trial, threads), [device])
        with self._lock:
            self._sessions.append(session)
            if self._stopped:
                session.kill()
                return "interrupted"
        try:
            _, message = session.receive()
            error: str = loads(message.payload, torch.device("cpu"))
        except WorkerDied as death:
            cause = f"was killed by {death.signal}" if death.signal else f"exited with status {death.exit_code}"
            error = f"its process {cause}: see {output}"
        except BaseException as failure:  # SystemExit in the worker, for example
            error = f"{type(failure).__name__}: {first_line(failure)}"
        finally:
            with self._lock:
                self._sessions.remove(session)
                session.kill()  # each trial gets a new process, which starts with free memory
        return error


@contextlib.contextmanager
def _train_trial(device: torch.device, channel: WorkerChannel, trial: Trial, threads: int) -> Iterator[None]:
    """Train a trial in a worker process and send the reason of a failure; the output goes to ``output.txt``."""
    keep_freed_memory()
    torch.set_num_threads(threads)
    prepare_folder(trial)
    with (trial.folder / "output.txt").open("wb") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    channel.send("result", dumps(run_trial(trial, device=str(device))))
    yield
