"""Trials side by side: each in a process of its own on a device of its own, as many at once as there are devices."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import torch

from duoka import devices
from duoka.devices.cpu import available_cores
from duoka.errors import ConfigError
from duoka.recipes.experiments.experiment_spec import Variant

__all__ = ["side_by_side"]


def side_by_side(trials: Sequence[Variant], say: Callable[[str], None]) -> dict[str, str]:
    """Train as many trials at once as there are devices; return what failed, by title, with the reason.

    Raises:
        ConfigError: the trials name different devices.

    """
    specs = {str(trial.options.get("device", "auto")) for trial in trials}
    if len(specs) > 1:
        raise ConfigError(
            f"--parallel gives each variant a device of its own, and they name {', '.join(sorted(specs))}: name one list"
        )
    chosen = devices.resolve(specs.pop()).devices if specs else ()
    free: SimpleQueue[str] = SimpleQueue()
    for device in chosen:
        free.put(str(device))
    threads = max(1, available_cores() // max(1, len(chosen)))
    processes = Processes()

    def train(trial: Variant) -> tuple[str, str]:
        device = free.get()
        try:
            say(f"{trial.title}: on {device}, output in {trial.folder / 'output.txt'}")
            error = processes.train(trial, device, threads)
        finally:
            free.put(device)
        if error:
            say(f"{trial.title}: failed: {error}")
        return trial.title, error

    with ThreadPoolExecutor(max(1, len(chosen))) as pool:
        try:
            failed = dict(pool.map(train, trials))
        except BaseException:  # Ctrl-C: none goes on alone, and none begins
            processes.end()
            raise
    return {title: error for title, error in failed.items() if error}


class Processes:
    """The processes that train, each of which ends when this one does, however it does."""

    def __init__(self) -> None:
        self._running: list[subprocess.Popen[bytes]] = []
        self._ended = False

    def train(self, trial: Variant, device: str, threads: int) -> str:
        """Train ``trial`` on ``device``; return why it failed, or nothing."""
        trial.folder.parent.mkdir(parents=True, exist_ok=True)
        error, output = trial.folder / "error.txt", trial.folder.with_name(f".{trial.folder.name}.output")
        error.unlink(missing_ok=True)
        with output.open("wb") as file:
            status = self._status(trial, device, threads, file.fileno())
        trial.folder.mkdir(parents=True, exist_ok=True)
        output.replace(trial.folder / "output.txt")
        if error.is_file():
            return error.read_text(encoding="utf-8").splitlines()[0]
        return "" if status == 0 else f"its process ended with status {status}: see {trial.folder / 'output.txt'}"

    def end(self) -> None:
        """Kill those that run, and start no other."""
        self._ended = True
        for process in self._running:
            process.kill()

    def _status(self, trial: Variant, device: str, threads: int, output: int) -> int:
        own = {"OMP_NUM_THREADS": str(threads)} if torch.device(device).type == "cpu" else {}
        command = [sys.executable, "-m", "duoka.recipes.experiments.process"]
        process = subprocess.Popen(
            command, bufsize=0, stdin=subprocess.PIPE, stdout=output, stderr=output, env={**os.environ, **own}
        )
        self._running.append(process)
        assert process.stdin is not None
        with process, process.stdin:
            if self._ended:
                process.kill()
            else:
                with contextlib.suppress(BrokenPipeError):  # it has ended already, which its status says
                    process.stdin.write(pickle.dumps((trial, device)))
            status = process.wait()
        self._running.remove(process)
        return status
