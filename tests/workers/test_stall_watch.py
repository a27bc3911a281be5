"""A worker that does not run, or takes long, is reported with rank, task and stack, and ended at a limit."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import duoka
from duoka.errors import ConfigError, WorkerStuck
from duoka.workers.stall_watch import LIMIT_VARIABLE, REPORT_VARIABLE, StallWatch
from support.processes import worker_pids
from support.waiting import wait_until

OWNER = os.getpid()


class Slow(nn.Linear):
    """Waits in workers until a file exists: in Python, or in C code that keeps Python from running."""

    def forward(self, x, go_on: str | None = None, *, in_c: bool = False):
        while go_on is not None and os.getpid() != OWNER and not os.path.exists(go_on):
            self.wait(in_c=in_c)
        return super().forward(x)

    def wait(self, *, in_c: bool) -> None:
        if in_c:
            ctypes.PyDLL(None).usleep(100_000)  # with the interpreter's lock
        else:
            time.sleep(0.05)


def go_on_after_report(caplog: pytest.LogCaptureFixture, file: Path) -> threading.Thread:
    """Start a thread that creates ``file`` after the first report."""
    thread = threading.Thread(target=lambda: (wait_until(lambda: caplog.records), file.touch()))
    thread.start()
    return thread


@pytest.mark.parametrize("in_c", [False, True])
def test_a_report_shows_the_line_of_the_users_code(monkeypatch, caplog, tmp_path, in_c: bool) -> None:
    model = duoka.DataParallel(Slow(4, 2), devices="cpu:2", check="off")
    model(torch.ones(4, 4))
    monkeypatch.setenv(REPORT_VARIABLE, "0.6")
    thread = go_on_after_report(caplog, tmp_path / "go_on")
    model(torch.ones(4, 4), str(tmp_path / "go_on"), in_c=in_c)
    thread.join()
    text = caplog.records[0].getMessage()
    assert "test_stall_watch.py" in text
    assert "in forward" in text
    assert "duoka/workers/" not in text


def test_a_worker_that_is_stopped_for_too_long_is_ended(monkeypatch) -> None:
    model = duoka.DataParallel(nn.Linear(4, 2), devices="cpu:2")
    model(torch.ones(4, 4))
    monkeypatch.setenv(LIMIT_VARIABLE, "0.6")
    os.kill(worker_pids()[0], signal.SIGSTOP)
    with pytest.raises(WorkerStuck, match=r"rank 1 .* stopped(.|\n)*DUOKA_STALL_LIMIT_S sets another limit") as caught:
        model(torch.ones(4, 4))
    monkeypatch.undo()
    assert (caught.value.rank, caught.value.device) == (1, "cpu:1")
    assert model(torch.ones(4, 4)).shape == (4, 2)


def wait_for_peer(action: str) -> int:
    if duoka.current_world().rank == 1 and action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    while duoka.current_world().rank == 1 and not os.path.exists(action):
        time.sleep(0.05)
    total = torch.ones(1)
    dist.all_reduce(total)
    return int(total)


def test_a_launch_reports_a_worker_that_rank_zero_waits_for(monkeypatch, caplog, tmp_path) -> None:
    duoka.launch(max, 1, 2, devices="cpu:2")
    monkeypatch.setenv(REPORT_VARIABLE, "0.6")
    thread = go_on_after_report(caplog, tmp_path / "go_on")
    assert duoka.launch(wait_for_peer, str(tmp_path / "go_on"), devices="cpu:2") == 2
    thread.join()
    assert "runs its part of the launch" in caplog.records[0].getMessage()


def test_a_launch_ends_when_a_worker_stays_stopped(monkeypatch) -> None:
    duoka.launch(max, 1, 2, devices="cpu:2")
    monkeypatch.setenv(LIMIT_VARIABLE, "0.6")
    with pytest.raises(WorkerStuck, match="is stopped"):
        duoka.launch(wait_for_peer, "stop", devices="cpu:2")


@pytest.mark.parametrize("value", ["soon", "-1", "inf", "nan"])
def test_a_wrong_number_of_seconds_is_an_error(monkeypatch, value: str) -> None:
    monkeypatch.setenv(REPORT_VARIABLE, value)
    with pytest.raises(ConfigError, match=f"DUOKA_STALL_REPORT_S='{value}'"):
        StallWatch([], "waits")


def test_zero_seconds_mean_never(monkeypatch) -> None:
    for name in (REPORT_VARIABLE, LIMIT_VARIABLE):
        monkeypatch.setenv(name, "0")
    StallWatch([], "waits").check()


def test_the_time_in_which_the_program_was_stopped_does_not_count(monkeypatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    monkeypatch.setenv(LIMIT_VARIABLE, "100")
    watch = StallWatch([], "waits")
    for seconds in (0.5, 3600.0, 0.5, 0.5):
        clock[0] += seconds
        watch.check()
    assert watch.waited_s == 1.5
