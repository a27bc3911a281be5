"""Failures of ``launch``: a rank raises, dies or is interrupted, and every process ends with a clear report."""

from __future__ import annotations

import contextlib
import datetime
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

import duoka
from duoka import errors
from duoka.launcher import rank_context
from duoka.workers.exceptions import RemoteTraceback
from support.processes import children, descendants, wait_for_exit, wait_until_gone
from support.waiting import wait_until

WAIT_S = 600
"""How long a rank waits for another: longer than any test may take, so that only an interruption ends the wait."""


class PickyError(Exception):
    def __init__(self, value: int, unit: str) -> None:
        super().__init__(f"{value} {unit}")
        self.value = value


def rank() -> int:
    return duoka.current_world().rank


def stay_in_collective() -> None:
    dist.all_reduce(torch.ones(1))


def stay_in_sleep() -> None:
    time.sleep(WAIT_S)


def stay_in_python() -> None:
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        pass


WAITS = [stay_in_collective, stay_in_sleep, stay_in_python]


@pytest.mark.parametrize("wait", WAITS)
@pytest.mark.parametrize("failing", [0, 1, 2])
def test_an_exception_on_any_rank_arrives_as_its_own_type(failing: int, wait) -> None:
    def fail() -> None:
        if rank() == failing:
            raise PickyError(3, "apples")
        wait()

    with pytest.raises(PickyError, match="3 apples") as caught:
        duoka.launch(fail, devices="cpu:3")
    assert caught.value.value == 3
    assert not children()
    assert not dist.is_initialized()
    if failing:
        assert isinstance(caught.value.__cause__, RemoteTraceback)
        assert f"Traceback of rank {failing} (cpu:{failing})" in str(caught.value.__cause__)
        assert "in fail" in str(caught.value.__cause__)
        assert "rank_context.py" not in str(caught.value.__cause__)


@pytest.mark.parametrize("error", [FileNotFoundError(2, "No such file", "data.csv"), RuntimeError("of the user's own")])
def test_an_error_of_rank_zero_is_not_hidden_by_its_consequences(error: Exception) -> None:
    def fail() -> None:
        if rank() == 0:
            time.sleep(0.2)  # the others wait in the collective, and then report a lost connection
            raise error
        stay_in_collective()

    for _ in range(3):
        with pytest.raises(type(error), match=str(error.args[-1])):
            duoka.launch(fail, devices="cpu:2")


def test_no_function_starts_before_all_ranks_are_connected(monkeypatch, tmp_path: Path) -> None:
    """Else a function that fails at once ends its rank, and rank 0 reports that it cannot connect."""
    connect, connected = dist.init_process_group, tmp_path / "connected"

    def connect_slowly(*args, **kwargs) -> None:
        connect(*args, **kwargs)
        time.sleep(0.5)
        connected.touch()

    monkeypatch.setattr(dist, "init_process_group", connect_slowly)
    assert duoka.launch(connected.exists, devices="cpu:3", returns="all") == [True] * 3


def test_ranks_that_cannot_connect_in_time_are_an_error_with_a_remedy(monkeypatch) -> None:
    duoka.close_workers()  # warm workers of earlier tests, which this launch would not use
    connect = dist.init_process_group

    def connect_late(*args, **kwargs) -> None:
        time.sleep(WAIT_S)  # ends as soon as the other rank has reported its failure
        connect(*args, **kwargs)

    monkeypatch.setattr(dist, "init_process_group", connect_late)
    monkeypatch.setattr(rank_context, "CONNECT_TIMEOUT", datetime.timedelta(seconds=1))
    with pytest.raises(errors.LaunchError, match=r"duoka's rendezvous rank 1 .* within 1 s.*overloaded"):
        duoka.launch(rank, devices="cpu:2")
    wait_until(lambda: not children())


def test_the_traceback_begins_at_the_users_function() -> None:
    def fail() -> None:
        raise ValueError("here")

    with pytest.raises(ValueError, match="here") as caught:
        duoka.launch(fail, devices="cpu")
    files = [Path(entry.path).name for entry in caught.traceback]
    assert files == ["test_failures.py", "api.py", "test_failures.py"]


def test_an_exception_that_cannot_be_pickled_keeps_name_and_message() -> None:
    def fail() -> None:
        class LockedError(Exception):
            pass

        error = LockedError("held")
        error.lock = threading.Lock()
        if rank() == 1:
            raise error
        stay_in_collective()

    with pytest.raises(errors.DuokaError, match="LockedError: held"):
        duoka.launch(fail, devices="cpu:2")


@pytest.mark.parametrize("wait", WAITS)
@pytest.mark.parametrize(
    ("end", "exit_code", "signal_name"),
    [
        (lambda: os._exit(7), 7, None),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), None, "SIGKILL"),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), None, "SIGSEGV"),
    ],
)
def test_a_worker_that_dies_is_reported_with_rank_signal_and_output(end, exit_code, signal_name, wait) -> None:
    def die() -> None:
        if rank() == 2:
            print("last words")
            end()
        wait()

    with pytest.raises(errors.WorkerDied) as caught:
        duoka.launch(die, devices="cpu:3")
    assert (caught.value.rank, caught.value.exit_code, caught.value.signal) == (2, exit_code, signal_name)
    assert "last words" in caught.value.last_output
    assert "rank 2 (cpu:2)" in str(caught.value)
    assert not children()


def test_a_worker_that_died_between_launches_is_replaced() -> None:
    duoka.launch(rank, devices="cpu:2")
    for pid in children():
        os.kill(pid, signal.SIGKILL)
        wait_for_exit(pid)
    assert duoka.launch(rank, devices="cpu:2", returns="all") == [0, 1]


def test_a_launch_works_after_every_kind_of_failure() -> None:
    def fail() -> None:
        if rank() == 1:
            raise ValueError("first")
        stay_in_sleep()

    for _ in range(2):
        with pytest.raises(ValueError, match="first"):
            duoka.launch(fail, devices="cpu:2")
        assert duoka.launch(rank, devices="cpu:2", returns="all") == [0, 1]


def test_a_failure_frees_a_caller_that_is_not_the_main_thread() -> None:
    def fail() -> None:
        if rank() == 1:
            raise ValueError("from worker")
        stay_in_python()

    caught: list[BaseException] = []

    def run() -> None:
        try:
            duoka.launch(fail, devices="cpu:2")
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert [type(error) for error in caught] == [ValueError]


def test_sys_exit_in_a_worker_raises_system_exit() -> None:
    def leave() -> None:
        if rank() == 1:
            sys.exit("done here")
        stay_in_collective()

    with pytest.raises(SystemExit, match="done here"):
        duoka.launch(leave, devices="cpu:2")


SCRIPT = """
    import os, sys, time
    import torch, torch.distributed as dist
    import duoka

    def stay_in_collective(): dist.all_reduce(torch.ones(1))
    def stay_in_sleep(): time.sleep(600)
    def stay_in_python():
        while True: pass
    def stay_in_loader():
        data = torch.utils.data.TensorDataset(torch.arange(10_000_000.0))
        for _ in torch.utils.data.DataLoader(data, batch_size=1, num_workers=2): pass

    def work(wait):
        world = duoka.current_world()
        if world.rank == 0:
            print("working", flush=True)
        if world.rank == 0 and wait is not stay_in_loader or world.rank and wait is stay_in_loader:
            wait()
        else:
            time.sleep(600)

    wait = globals()[sys.argv[1]]
    duoka.launch(lambda: 0, devices="cpu:3")
    duoka.launch(work, wait, devices="cpu:3")
"""


def start_script(folder: Path, wait: str) -> subprocess.Popen[str]:
    (process,) = start_scripts(folder, [wait])
    return process


def start_scripts(folder: Path, waits: list[str]) -> list[subprocess.Popen[str]]:
    script = folder / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    processes = [
        subprocess.Popen([sys.executable, str(script), wait], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for wait in waits
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "working\n"
    return processes


@pytest.mark.parametrize("wait", ["stay_in_collective", "stay_in_sleep", "stay_in_python", "stay_in_loader"])
def test_ctrl_c_ends_everything_once(tmp_path: Path, wait: str) -> None:
    process = start_script(tmp_path, wait)
    pids = wait_for_descendants(process, wait)
    process.send_signal(signal.SIGINT)
    _, shown = process.communicate()
    assert shown.count("KeyboardInterrupt") == 1
    assert shown.rstrip().endswith("KeyboardInterrupt")
    assert process.returncode == -signal.SIGINT
    wait_until_gone(pids)


@pytest.mark.parametrize("wait", ["stay_in_collective", "stay_in_loader"])
def test_workers_and_their_children_end_when_the_caller_is_killed(tmp_path: Path, wait: str) -> None:
    process = start_script(tmp_path, wait)
    pids = wait_for_descendants(process, wait)
    process.kill()
    process.communicate()
    wait_until_gone(pids)


def wait_for_descendants(process: subprocess.Popen[str], wait: str) -> list[int]:
    """Wait until rank 0 waits; return its workers, and with ``stay_in_loader`` the two DataLoader processes of each."""
    expected = 6 if wait == "stay_in_loader" else 2
    if wait != "stay_in_python":
        wait_until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_SLEEPING)
    return wait_until(lambda: found if len(found := descendants(process.pid)) >= expected else [])


def test_a_program_that_ends_leaves_no_worker_behind(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import duoka, os, psutil\n"
        "duoka.launch(lambda: 0, devices='cpu:3')\n"
        "print(*[child.pid for child in psutil.Process().children()])\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    pids = [int(word) for word in done.stdout.split()]
    assert len(pids) == 2
    assert not done.stderr
    wait_until_gone(pids)


def test_a_forked_child_keeps_no_worker_alive(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import duoka, os, psutil, time\n"
        "duoka.launch(lambda: 0, devices='cpu:2')\n"
        "pids = [child.pid for child in psutil.Process().children()]\n"
        "if os.fork() == 0:\n"
        "    time.sleep(600); os._exit(0)\n"
        "print(*pids, flush=True)\n"
        "time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pids = [int(word) for word in process.stdout.readline().split()]
    forked = [child.pid for child in psutil.Process(process.pid).children() if child.pid not in pids]
    process.kill()
    process.wait()
    try:
        assert len(pids) == 1
        wait_until_gone(pids)
    finally:
        for pid in forked:
            os.kill(pid, signal.SIGKILL)
        process.stdout.close()


@pytest.mark.slow
def test_fifty_launches_leave_no_thread_descriptor_or_process() -> None:
    duoka.launch(rank, devices="cpu:3")
    before = resources()
    for _ in range(50):
        assert duoka.launch(rank, devices="cpu:3", returns="all") == [0, 1, 2]
    assert resources() == before


def resources() -> tuple[int, int, list[int]]:
    return psutil.Process().num_fds(), psutil.Process().num_threads(), list(children())


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("count", [25, pytest.param(50, marks=pytest.mark.extended)])
def test_kills_of_workers_at_random_moments_are_all_reported(count: int) -> None:
    """A thread kills a worker during start-up, work or clean-up: the launch succeeds, or reports the death."""
    draws = random.Random(5)
    duoka.launch(reduce_often, devices="cpu:3")
    reports = [launch_while_killing(draws) for _ in range(count)]
    died = [report for report in reports if report is not None]
    assert len(died) >= count // 5
    assert {error.signal for error in died} == {"SIGKILL"}


def reduce_often() -> int:
    for _ in range(20):
        dist.all_reduce(torch.ones(1000))
    return rank()


def launch_while_killing(draws: random.Random) -> errors.WorkerDied | None:
    """Launch while a thread kills a worker; return the reported death, if any."""
    delay_s, number, warm = draws.uniform(0, 0.15), draws.randrange(2), list(children())

    def kill_one() -> None:
        time.sleep(delay_s)
        pids = warm or list(children())
        if number < len(pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pids[number], signal.SIGKILL)
                wait_for_exit(pids[number])  # else the next launch may reuse a worker that is about to end

    killer = threading.Thread(target=kill_one)
    killer.start()
    try:
        assert duoka.launch(reduce_often, devices="cpu:3", returns="all") == [0, 1, 2]
    except errors.WorkerDied as error:
        return error
    finally:
        killer.join()
    return None


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("pairs", [5, pytest.param(10, marks=pytest.mark.extended)])
def test_kills_of_the_caller_at_random_moments_leave_no_process(pairs: int, tmp_path: Path) -> None:
    draws = random.Random(6)
    for _ in range(pairs):
        for process in start_scripts(tmp_path, ["stay_in_collective", "stay_in_sleep"]):
            time.sleep(draws.uniform(0, 0.2))
            pids = descendants(process.pid)
            process.kill()
            process.communicate()
            assert len(pids) == 2
            wait_until_gone(pids)


class HeavyError(Exception):
    pass


def test_descriptors_of_unused_results_and_exceptions_are_closed() -> None:
    def fail() -> torch.Tensor:
        if rank() == 2:
            time.sleep(0.3)  # rank 1 has sent its result by then
            raise HeavyError(torch.zeros(1 << 20))
        return torch.ones(1 << 20)

    def once() -> None:
        with pytest.raises(HeavyError):
            duoka.launch(fail, devices="cpu:3", returns="all")

    once()
    before = psutil.Process().num_fds()
    once()
    assert psutil.Process().num_fds() <= before


PRINTING_SCRIPT = """
import os, duoka
duoka.launch(lambda: [os.write(1, "\u00e9 spoken\\n".encode()) for _ in range(300)], devices="cpu:2", output="all")
"""


@pytest.mark.parametrize("reader", ["cat", "head -1"])
def test_output_that_cannot_be_printed_stops_no_rank(tmp_path: Path, reader: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(PRINTING_SCRIPT, encoding="utf-8")
    command = f"{sys.executable} {script} | {reader}"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, shell=True, capture_output=True, env=environment, check=False)
    assert b"spoken" in done.stdout


def test_a_failure_frees_a_caller_that_ignores_ctrl_c(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import signal, time, duoka\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "def work():\n"
        "    if duoka.current_world().rank: raise ValueError('from worker')\n"
        "    time.sleep(600)\n"
        "try:\n    duoka.launch(work, devices='cpu:2')\n"
        "except ValueError as error:\n    print(error, signal.getsignal(signal.SIGINT) is signal.SIG_IGN)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert done.stdout == "from worker True\n"


def test_ctrl_c_during_clean_up_is_not_lost(monkeypatch) -> None:
    from duoka.workers import pool

    def interrupted() -> dict[str, int]:
        signal.raise_signal(signal.SIGINT)
        return {}

    duoka.launch(rank, devices="cpu:2")
    monkeypatch.setattr(pool, "_user_sources", interrupted)
    with pytest.raises(KeyboardInterrupt):
        duoka.launch(rank, devices="cpu:2")


@pytest.mark.extended
@pytest.mark.parametrize("in_thread", [False, True])
def test_a_failure_while_rank_zero_returns_is_still_reported(in_thread: bool) -> None:
    """Rank 0 returns at about the moment at which a worker fails, each time a little later."""

    def fail(delay_s: float) -> None:
        if rank() == 1:
            raise PickyError(1, "pear")
        end = time.perf_counter() + delay_s
        while time.perf_counter() < end:
            pass

    caught: list[BaseException] = []

    def attempt(delay_s: float) -> None:
        try:
            duoka.launch(fail, delay_s, devices="cpu:2")
        except BaseException as error:
            caught.append(error)

    for number in range(6):
        run = threading.Thread(target=attempt, args=(number * 0.002,)) if in_thread else None
        if run is None:
            attempt(number * 0.002)
        else:
            run.start()
            run.join()
    assert [type(error) for error in caught] == [PickyError] * 6
    assert not children()
