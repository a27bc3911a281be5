"""Warm workers: deaths while they start, ``close_workers`` while they are in use, and limits of the system."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import duoka
from duoka.errors import LaunchError, WorkerDied
from duoka.workers import pool
from support.processes import wait_until_gone, worker_pids
from support.waiting import wait_until


def test_a_death_at_the_start_is_reported_while_others_still_start() -> None:
    duoka.close_workers()
    failures: list[BaseException] = []

    def acquire() -> None:
        try:
            pool.acquire([torch.device("cpu")] * 2)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=acquire)
    thread.start()
    first, second = wait_until(lambda: pids if len(pids := worker_pids()) == 2 else [])
    os.kill(first, signal.SIGSTOP)
    os.kill(second, signal.SIGKILL)
    thread.join()
    (failure,) = failures
    assert isinstance(failure, WorkerDied)
    assert failure.rank == 2
    wait_until_gone([first, second])


def test_close_workers_leaves_the_users_descriptors_alone() -> None:
    model = duoka.DataParallel(nn.Linear(4, 2), devices="cpu:2")
    model(torch.ones(4, 4))
    duoka.close_workers()
    pipes = [os.pipe() for _ in range(12)]
    for reading, writing in pipes:
        os.set_blocking(reading, False)
        os.write(writing, b"the user's own data")
    assert model(torch.ones(4, 4)).shape == (4, 2)
    for reading, writing in pipes:
        assert os.read(reading, 100) == b"the user's own data"
        os.close(reading)
        os.close(writing)


def test_a_worker_that_dies_as_its_session_begins_is_a_death(monkeypatch) -> None:
    from duoka.workers import worker_session

    duoka.close_workers()
    duoka.launch(max, 1, 2, devices="cpu:2")
    real = worker_session.dumps

    def dumps_late(*arguments):
        for pid in (pids := worker_pids()):
            os.kill(pid, signal.SIGKILL)
        wait_until_gone(pids)
        return real(*arguments)

    monkeypatch.setattr(worker_session, "dumps", dumps_late)
    with pytest.raises(WorkerDied, match="SIGKILL"):
        duoka.DataParallel(nn.Linear(4, 2), devices="cpu:2")(torch.ones(4, 4))


def test_a_stopped_worker_ends_with_a_killed_owner(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        textwrap.dedent("""
        import os, signal, sys, threading, duoka
        from duoka.workers import pool
        def start():
            duoka.launch(max, 1, 2, devices="cpu:2")
        if sys.argv[1] == "thread":
            thread = threading.Thread(target=start); thread.start(); thread.join()
        start()
        pids = [worker.pid for worker in pool._pool._idle]
        for pid in pids: os.kill(pid, signal.SIGSTOP)
        print(*pids, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        """)
    )
    for starter in ("main", "thread"):
        done = subprocess.run([sys.executable, "script.py", starter], cwd=tmp_path, capture_output=True, text=True)
        pids = list(map(int, done.stdout.split()))
        assert len(pids) == 1, done.stderr
        wait_until_gone(pids)


def use_launch() -> None:
    assert duoka.launch(max, 1, 2, devices="cpu:2") == 2


def use_model() -> None:
    model = duoka.DataParallel(nn.Linear(4, 2), devices="cpu:2")
    try:
        model(torch.ones(4, 4)).sum().backward()
    finally:
        model.close()


@contextlib.contextmanager
def spare_descriptors(count: int) -> Iterator[None]:
    """Leave this process ``count`` descriptors that it may open."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 40, before[1]))
    opened = []
    try:
        with contextlib.suppress(OSError):
            while True:
                opened.append(os.dup(0))
        for _ in range(count):
            os.close(opened.pop())
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for fd in opened:
            os.close(fd)


@pytest.mark.parametrize("use", [use_launch, use_model])
@pytest.mark.parametrize(("is_warm", "counts"), [(True, range(6)), (False, (0, 3, 6))])
def test_too_few_descriptors_are_an_error_with_a_remedy(use: Callable[[], None], is_warm: bool, counts) -> None:
    use()
    failures = []
    for count in counts:
        if not is_warm:
            duoka.close_workers()
        with spare_descriptors(count):
            try:
                use()
            except BaseException as error:
                failures.append((count, error))
        if failures and is_warm:
            use()
    assert failures
    for count, failure in failures:
        assert isinstance(failure, LaunchError), (count, repr(failure))
        assert "ulimit -n" in str(failure), (count, repr(failure))
    use()
