"""Child processes of the test run: which there are, what runs in them, and when they are gone."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import psutil

from support.waiting import wait_until

WORKER_PROGRAM = "duoka.workers.worker_main"


def children() -> dict[int, str]:
    """Return the process id and command line of each direct child, without Python's resource tracker."""
    lists = task_lists()
    pids = [int(pid) for pids in lists for pid in pids] if lists else [c.pid for c in psutil.Process().children()]
    lines = {pid: command_line(pid) for pid in pids}
    return {pid: line for pid, line in lines.items() if "multiprocessing.resource_tracker" not in line}


def task_lists(tasks: str | Path = "/proc/self/task") -> list[list[str]]:
    """Return Linux's lists of children, one a thread: ten times faster than a search through all processes.

    A thread that ends meanwhile has no list any more; the kernel has moved its children to another thread's list.
    """
    lists = []
    for path in Path(tasks).glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            lists.append(path.read_text().split())
    return lists


def command_line(pid: int) -> str:
    try:
        return " ".join(psutil.Process(pid).cmdline()) or "ended, not yet waited for"
    except psutil.Error:
        return "ended"


def worker_pids(pid: int | None = None) -> list[int]:
    """Return the process ids of duoka's workers that the process ``pid`` (default: this one) has started."""
    started = children() if pid is None else {c.pid: command_line(c.pid) for c in psutil.Process(pid).children()}
    return [number for number, line in started.items() if WORKER_PROGRAM in line]


def descendants(pid: int | None = None) -> list[int]:
    """Return the process ids of everything below ``pid`` (default: this process), without the resource tracker."""
    found = psutil.Process(pid).children(recursive=True)
    return [child.pid for child in found if "multiprocessing.resource_tracker" not in command_line(child.pid)]


def is_running(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until_gone(pids: list[int]) -> None:
    """Wait until none of these processes runs; raises AssertionError when one still does."""
    wait_until(lambda: not any(map(is_running, pids)))


def wait_for_exit(pid: int) -> None:
    """Wait until all threads of a child have ended, and leave its exit status for others to read."""
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
