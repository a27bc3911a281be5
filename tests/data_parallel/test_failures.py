"""Failures of a chunk: the user gets the exception as from one device, and the next call works."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import duoka
from duoka import errors
from duoka.workers.exceptions import RemoteTraceback
from support.processes import wait_until_gone, worker_pids
from support.transports import both_transports
from support.waiting import wait_until


class PickyError(Exception):
    def __init__(self, value: int, unit: str) -> None:
        super().__init__(f"{value} {unit}")
        self.value = value


class Moody(nn.Module):
    """Fails if a chunk holds a negative number, in forward or backward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, x, *, backward: bool = False):
        out = self.layer(x)
        if (x < 0).any():
            if not backward:
                raise PickyError(3, "apples")
            out.register_hook(self.fail)
        return out

    def fail(self, _):
        raise PickyError(4, "pears")


def batch(bad: int | None) -> torch.Tensor:
    x = torch.ones(3, 1)
    if bad is not None:
        x[bad] = -1
    return x


@both_transports
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_an_exception_of_any_device_arrives_as_its_own_type(bad: int, backward: bool, wrap) -> None:
    model = wrap(Moody(), "cpu:3", check="off")
    model(batch(None)).sum().backward()
    before = worker_pids()
    with pytest.raises(PickyError) as caught:
        model(batch(bad), backward=backward).sum().backward()
    assert caught.value.value == (4 if backward else 3)
    if bad:
        assert isinstance(caught.value.__cause__, RemoteTraceback)
        assert f"Traceback of rank {bad} (cpu:{bad})" in str(caught.value.__cause__)
        assert "in fail" in str(caught.value.__cause__) or not backward
    model.zero_grad()
    model(batch(None)).sum().backward()
    assert model.layer.weight.grad.item() == 3
    assert worker_pids() == before
    assert torch.get_num_threads() == 1


class Deadly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.owner = os.getpid()

    def forward(self, x, *, end: bool = False):
        if end and os.getpid() != self.owner:
            print("last words", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return self.layer(x)


@both_transports
def test_a_worker_that_dies_in_a_call_is_reported_and_replaced(wrap) -> None:
    model = wrap(Deadly(), "cpu:3")
    kept = model(batch(None)).sum()
    before = worker_pids()
    with pytest.raises(errors.WorkerDied, match="SIGKILL") as caught:
        model(batch(None), end=True)
    assert "last words" in caught.value.last_output
    with pytest.raises(RuntimeError, match="run the forward again"):
        kept.backward()
    model(batch(None)).sum().backward()
    assert model.layer.weight.grad.item() == 3
    assert not set(before) & set(worker_pids())


@both_transports
def test_a_worker_killed_between_calls_is_reported_and_replaced(wrap) -> None:
    model = wrap(Deadly())
    out = model(batch(None)).sum()
    os.kill(worker_pids()[0], signal.SIGKILL)
    with pytest.raises(errors.WorkerDied):
        out.backward()
    model(batch(None)).sum().backward()
    assert model.layer.weight.grad.item() == 3


@both_transports
def test_an_attribute_that_cannot_be_pickled_is_named(wrap) -> None:
    model = wrap(Deadly())
    model.module.lock = threading.Lock()
    with pytest.raises(errors.LaunchError, match="attribute 'lock'"):
        model(batch(None))
    del model.module.lock
    assert model(batch(None)).shape == (3, 1)


@both_transports
def test_a_worker_that_prints_much_does_not_block(wrap) -> None:
    class Loud(nn.Module):
        def forward(self, x):
            print("x" * 300_000)
            return x

    assert wrap(Loud())(batch(None)).shape == (3, 1)


@both_transports
def test_interrupting_a_call_stops_it_and_the_next_works(tmp_path: Path, transport: str) -> None:
    (tmp_path / "script.py").write_text(
        textwrap.dedent("""
        import os, signal, threading, time, torch, duoka
        from torch import nn

        class Slow(nn.Linear):
            def forward(self, x, wait=0):
                if os.getpid() != OWNER:
                    time.sleep(wait)
                return super().forward(x)

        OWNER = os.getpid()
        model = duoka.DataParallel(Slow(2, 1), devices="cpu:2")
        model(torch.ones(4, 2))
        threading.Timer(0.5, os.kill, (OWNER, signal.SIGINT)).start()
        try:
            model(torch.ones(4, 2), wait=600)
        except KeyboardInterrupt:
            print("interrupted")
        print(tuple(model(torch.ones(4, 2)).shape))
        """)
    )
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout == "interrupted\n(4, 1)\n", done.stderr
    assert done.stderr == ""


@pytest.mark.slow
def test_a_script_that_ends_or_is_killed_leaves_no_worker(tmp_path: Path, transport: str) -> None:
    script = """
        import os, psutil, torch, duoka
        model = duoka.DataParallel(torch.nn.Linear(2, 1), devices="cpu:2")
        model(torch.ones(4, 2)).sum().backward()
        print(*[c.pid for c in psutil.Process().children()], flush=True)
        os.kill(os.getpid(), END) if END else None
    """
    for end in (0, int(signal.SIGKILL)):
        (tmp_path / "script.py").write_text(textwrap.dedent(script).replace("END", str(end)))
        done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == -end, done.stderr
        wait_until_gone(list(map(int, done.stdout.split())))


@both_transports
def test_two_threads_may_use_one_model(wrap) -> None:
    model = wrap(nn.Linear(2, 1))
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(20):
                model(torch.ones(4, 2)).sum().backward()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert isinstance(model, duoka.DataParallel)


@both_transports
def test_a_model_goes_on_after_close_workers(wrap) -> None:
    model = wrap(nn.Linear(4, 2))
    old = model(torch.ones(4, 4)).sum()
    pids = worker_pids()
    duoka.close_workers()
    wait_until_gone(pids)
    with pytest.raises(errors.WorkerDied, match=r"close_workers\(\)"):
        old.backward()
    model(torch.ones(4, 4)).sum().backward()
    assert torch.equal(model.module.bias.grad, torch.tensor([4.0, 4.0]))


@both_transports
def test_a_wrapped_model_leaves_the_temporary_folder_empty(monkeypatch, tmp_path, wrap) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    wrap(nn.Linear(2, 1))(torch.ones(4, 2)).sum().backward()
    assert not list(tmp_path.iterdir())


@both_transports
def test_a_stopped_worker_is_reported_and_may_go_on(wrap, monkeypatch, caplog) -> None:
    model = wrap(nn.Linear(4, 2))
    model(torch.ones(4, 4))
    monkeypatch.setenv("DUOKA_STALL_REPORT_S", "0.6")
    (pid,) = worker_pids()
    os.kill(pid, signal.SIGSTOP)
    thread = threading.Thread(target=lambda: (wait_until(lambda: caplog.records), os.kill(pid, signal.SIGCONT)))
    thread.start()
    assert torch.equal(model(torch.ones(4, 4)), model.module(torch.ones(4, 4)))
    thread.join()
    text = caplog.records[0].getMessage()
    for part in (f"rank 1 (cpu:1, process {pid})", "computes a forward pass", "stopped", f"kill -CONT {pid}"):
        assert part in text
