"""Seeded faults over the ways to train: every run must end with the bits of an undisturbed one, and leave nothing.

``python tests/faults/soak.py [--runs 200] [--seed 0]`` prints a table of kinds and counts.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from faults.victim import EVERY, NUM_STEPS
from support.waiting import wait_until

VICTIM = Path(__file__).with_name("victim.py")
WORKER_FAULTS = ("worker killed", "worker stopped", "temporary folder emptied")
TRAINER_FAULTS = (
    "SIGKILL", "SIGTERM", "SIGHUP", "SIGUSR1", "Ctrl-C", "exception", "full disk", "temporary folder emptied",
    "damaged checkpoint",
)  # fmt: skip
FIRST_STEPS = {"damaged checkpoint": 2 * EVERY + 1}
"""Steps before which a fault cannot be survived: a damaged checkpoint needs one before it."""
MAX_ATTEMPTS = 4


@dataclass(frozen=True)
class Trial:
    """One run: how it trains, on what, and the fault after a step."""

    way: str
    device: str
    fault: str
    step: int


def schedule(count: int, seed: int) -> list[Trial]:
    """Draw trials: each kind about equally often, at random steps, on one to three ranks."""
    draw = random.Random(seed)
    kinds = [("Trainer", device, fault) for fault in TRAINER_FAULTS for device in ("cpu", "cpu:2")]
    kinds += [("Trainer", "cpu:2", fault) for fault in WORKER_FAULTS]
    kinds += [
        (way, device, fault)
        for way in ("DataParallel", "launch")
        for device in ("cpu:2", "cpu:3")
        for fault in WORKER_FAULTS
    ]
    kinds = list(dict.fromkeys(kinds))
    order: list[tuple[str, str, str]] = []
    while len(order) < count:
        order += draw.sample(kinds, len(kinds))
    return [Trial(*kind, draw.randint(FIRST_STEPS.get(kind[2], 1), NUM_STEPS - 1)) for kind in order[:count]]


class Victims:
    """The server that forks a process for each attempt."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._references: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
        self._server = subprocess.Popen(
            [sys.executable, str(VICTIM)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def close(self) -> None:
        """End the server."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()

    def attempt(self, trial: Trial, folder: Path) -> int:
        """Train once, and return the exit status."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        (folder / "tmp").mkdir(parents=True, exist_ok=True)
        print(json.dumps(asdict(trial) | {"folder": str(folder)}), file=self._server.stdin, flush=True)
        return int(self._server.stdout.readline())

    def reference(self, trial: Trial) -> dict[str, torch.Tensor]:
        """Return the parameters of an undisturbed run."""
        key = trial.way, trial.device
        if key not in self._references:
            folder = self.folder / f"{trial.way}-{trial.device}"
            assert self.attempt(replace(trial, fault="none"), folder) == 0, (folder / "log.txt").read_text()
            self._references[key] = torch.load(folder / "end.pt")
        return self._references[key]

    def run(self, trial: Trial, folder: Path) -> tuple[int, str]:
        """Run a trial to its end; return how many attempts that took, and what is wrong, or nothing."""
        expected = self.reference(trial)
        is_damaged = trial.fault == "damaged checkpoint"
        status = self.attempt(replace(trial, fault="SIGKILL") if is_damaged else trial, folder)
        attempts = 1
        while status != 0 and attempts < MAX_ATTEMPTS:
            if is_damaged and attempts == 1:
                damage(folder)
            status = self.attempt(replace(trial, fault="none"), folder)
            attempts += 1
            first = folder / "first"  # a run that had ended, and was only not written, takes no step
            lost = trial.step + 1 - int(first.read_text()) if first.exists() else 0
            if attempts == 2 and lost > EVERY * (2 if is_damaged else 1):
                return attempts, f"{lost} steps were lost"
        if status != 0:
            return attempts, f"status {status}: {(folder / 'log.txt').read_text()[-2000:]}"
        found = torch.load(folder / "end.pt")
        different = [name for name in expected if not torch.equal(expected[name], found[name])]
        if different:
            return attempts, f"other bits in {different}"
        return attempts, leftovers(folder)


def damage(folder: Path) -> None:
    """Overwrite the middle of the last checkpoint, if there is one."""
    last = folder / "run" / "checkpoint" / "last.pt"
    if last.exists():
        with last.open("r+b") as file:
            file.seek(last.stat().st_size // 2)
            file.write(b"damage" * 20)


def leftovers(folder: Path) -> str:
    """Name processes and files that a trial has left."""
    with contextlib.suppress(AssertionError):
        wait_until(lambda: not processes_of(folder), timeout_s=10)
    if left := processes_of(folder):
        return f"left processes {left}"
    files = [*(folder / "tmp").iterdir(), *folder.glob("run/**/*.part"), *folder.glob("run/**/next.pt")]
    return f"left files {files}" if files else ""


def processes_of(folder: Path) -> list[int]:
    """Return the processes that a trial has started and that still run."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("DUOKA_SOAK") == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def run_all(trials: list[Trial], folder: Path) -> Iterator[tuple[Trial, int, str]]:
    """Run trials one after another; yield each with its attempts and what is wrong."""
    with contextlib.closing(Victims(folder)) as victims:
        for number, trial in enumerate(trials):
            yield trial, *victims.run(trial, folder / str(number))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--runs", type=int, default=200)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    attempts: dict[tuple[str, str, str], list[int]] = collections.defaultdict(list)
    failures = []
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        for trial, count, wrong in run_all(schedule(given.runs, given.seed), Path(folder)):
            attempts[trial.way, trial.device, trial.fault].append(count)
            print("." if not wrong else f"\n{trial}: {wrong}\n", end="", flush=True)
            failures += [trial] if wrong else []
    print("\n\n| way | devices | fault | runs | starts a run | failed |\n|---|---|---|---|---|---|")
    for (way, device, fault), counts in sorted(attempts.items()):
        failed = sum((trial.way, trial.device, trial.fault) == (way, device, fault) for trial in failures)
        print(f"| {way} | {device} | {fault} | {len(counts)} | {sum(counts) / len(counts):.1f} | {failed} |")
    print(f"\n{given.runs} runs, {len(failures)} failed, seed {given.seed}")
    sys.exit(bool(failures))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
