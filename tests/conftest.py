"""What holds for every test: nothing of it stays. No process, thread, socket, variable, group, folder or file."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

GRACE_S = 3.0
"""How long something may take to go by itself after a test before it counts as left behind."""
HELPER = "duoka.workers.worker_main"
SET_BY_OTHERS = ("PYTEST_", "COV_", "KMP_", "TORCHINDUCTOR_", "TRITON_", "CUDA_MODULE_LOADING", "COLUMNS", "LINES")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "leaks_allowed: what this test starts may outlive it; say why beside the marker")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Spare each collection of garbage the half million objects of torch's and the tests' imports: a twentieth of the time."""
    gc.collect()
    gc.freeze()


@dataclass(frozen=True)
class Snapshot:
    """What a test could leave behind, each thing by a name that says what it is."""

    processes: dict[int, str]
    threads: dict[int, str]
    sockets: dict[str, str]
    variables: dict[str, str]
    files: frozenset[str]
    folder: str
    in_a_group: bool

    def left_since(self, before: Snapshot) -> list[str]:
        """Say what is here and was not ``before``."""
        left = [f"process {pid}: {line}" for pid, line in self.processes.items() if pid not in before.processes]
        left += [f"thread {name}" for ident, name in self.threads.items() if ident not in before.threads]
        left += [f"file descriptor {fd} of {it}" for it, fd in self.sockets.items() if it not in before.sockets]
        left += [f"file {name}" for name in sorted(self.files - before.files)]
        left += self.changed_variables(before)
        if self.folder != before.folder:
            left.append(f"working directory {self.folder}, was {before.folder}")
        if self.in_a_group and not before.in_a_group:
            left.append("the default process group of torch.distributed")
        return left

    def changed_variables(self, before: Snapshot) -> list[str]:
        names = sorted(self.variables.keys() | before.variables.keys())
        changed = [name for name in names if self.variables.get(name) != before.variables.get(name)]
        return [f"environment variable {name}={self.variables.get(name)!r}" for name in changed]


def take_snapshot() -> Snapshot:
    distributed = sys.modules.get("torch.distributed")
    return Snapshot(
        processes=children(),
        threads={thread.ident or 0: thread.name for thread in threading.enumerate()},
        sockets=open_sockets(),
        variables={name: value for name, value in os.environ.items() if not name.startswith(SET_BY_OTHERS)},
        files=frozenset(name for name in os.listdir(tempfile.gettempdir()) if name.startswith(("duoka", ".duoka"))),
        folder=os.getcwd(),
        in_a_group=bool(distributed and distributed.is_available() and distributed.is_initialized()),
    )


def children() -> dict[int, str]:
    """The child processes and what runs in them; Python's resource tracker lives as long as its process on purpose."""
    lists = task_lists()
    pids = [int(pid) for pids in lists for pid in pids] if lists else [c.pid for c in psutil.Process().children()]
    lines = {pid: command_line(pid) for pid in pids}
    return {pid: line for pid, line in lines.items() if "multiprocessing.resource_tracker" not in line}


def task_lists(tasks: str | Path = "/proc/self/task") -> list[list[str]]:
    """Linux's lists of children, a tenth of the time of looking through all processes.

    One that is gone when it is read was of a thread that has ended: its children are in another thread's list.
    """
    lists = []
    for path in Path(tasks).glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            lists.append(path.read_text().split())
    return lists


def command_line(pid: int) -> str:
    try:
        return " ".join(psutil.Process(pid).cmdline()) or "ended, and nobody has waited for it"
    except psutil.Error:
        return "ended"


def open_sockets() -> dict[str, str]:
    found = {}
    for entry in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []:
        try:
            target = os.readlink(f"/proc/self/fd/{entry}")
        except OSError:
            continue
        if target.startswith("socket:"):
            found[target] = entry
    return found


def of_warm_helpers(left: str) -> bool:
    """Whether this belongs to helpers that duoka keeps for the next launch, which the module's end looks at."""
    return HELPER in left or left.startswith(("thread duoka-", "file descriptor"))


def still_left(before: Snapshot, *, helpers_stay: bool) -> list[str]:
    """What is left after what goes by itself has had time to."""
    deadline = time.monotonic() + GRACE_S
    while True:
        now = take_snapshot()
        left = now.left_since(before)
        if helpers_stay and any(HELPER in line for line in now.processes.values()):
            left = [line for line in left if not of_warm_helpers(line)]
        if not left or time.monotonic() > deadline:
            return left
        gc.collect()
        multiprocessing.active_children()  # waits for those that have ended
        time.sleep(0.02)


@pytest.fixture(scope="session", autouse=True)
def own_temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Temporary files go to a folder of this run, so that those of other runs are not taken for its own."""
    before, folder = os.environ.get("TMPDIR"), tmp_path_factory.mktemp("t")
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    yield
    tempfile.tempdir = None
    del os.environ["TMPDIR"]
    if before is not None:
        os.environ["TMPDIR"] = before


@pytest.fixture(scope="module", autouse=True)
def no_helper_outlives_its_module(own_temporary_folder: None) -> Iterator[None]:
    """End the warm helpers after each module, and fail when anything of them stays."""
    before = take_snapshot()
    yield
    if team := sys.modules.get("duoka.workers"):
        team.close_workers()
        if left := still_left(before, helpers_stay=False):
            pytest.fail("close_workers() left behind:\n  " + "\n  ".join(left), pytrace=False)


@pytest.fixture(autouse=True)
def nothing_stays(request: pytest.FixtureRequest, no_helper_outlives_its_module: None) -> Iterator[None]:
    """Fail the test that leaves something behind."""
    before = take_snapshot()
    yield
    if request.node.get_closest_marker("leaks_allowed"):
        return
    if left := still_left(before, helpers_stay=True):
        pytest.fail("the test left behind:\n  " + "\n  ".join(left), pytrace=False)
