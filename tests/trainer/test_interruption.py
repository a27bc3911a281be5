"""Signals and time limits: all ranks stop after the same step, save, and the resumed run ends like an undisturbed one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
import torch

from duoka.checkpoint import load_training
from duoka.errors import ConfigError, TrainingInterrupted
from duoka.trainer import Callback
from support.processes import wait_until_gone, worker_pids
from support.tiny_training import loader, trainer_of
from support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("one_thread")
SIGNALS = {signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGUSR1: 138}


@pytest.fixture(autouse=True)
def meet_after_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("duoka.trainer.step_agreement.INTERVAL_S", 0.0)


class Send(Callback):
    """Sends a signal after a step: to this process, or to the first worker."""

    def __init__(self, step: int, number: int = signal.SIGTERM, to_worker: bool = False) -> None:
        self.step, self.number, self.to_worker = step, number, to_worker

    def on_step_end(self, state) -> None:
        if state.step == self.step:
            os.kill(worker_pids()[0] if self.to_worker else os.getpid(), self.number)


def fit(folder: Path | None, *callbacks: Callback, device: str = "cpu", **options) -> tuple[torch.nn.Module, object]:
    settings = {"optimizer": "sgd", "optimizer_options": {"momentum": 0.9}, "lr": 0.1, "tensorboard": False}
    settings |= {"batch_size_means": "global", "out_dir": folder, "device": device, "callbacks": callbacks}
    trainer = trainer_of(loader(shuffle=True), eval_data=loader(), **(settings | options))
    trainer.fit()
    return trainer.model, trainer


@pytest.mark.parametrize("device", ["cpu", "cpu:2"])
@pytest.mark.parametrize("step", [2, 3, 4])  # an epoch has 3 steps
def test_a_run_stopped_by_a_signal_resumes_bit_identically(tmp_path, device, step):
    whole, reference = fit(None, device=device, epochs=3)
    with pytest.raises(TrainingInterrupted, match="SIGTERM") as stopped:
        fit(tmp_path, Send(step), device=device, epochs=3)
    assert stopped.value.code == 143
    assert load_training(tmp_path / "checkpoint" / "last.pt")["state"]["step"] == step
    assert not (tmp_path / "model.safetensors").exists()
    assert f"stopped by SIGTERM after {step} steps" in (tmp_path / "log.txt").read_text()
    resumed, trainer = fit(tmp_path, device=device, epochs=3, resume=True)
    assert torch.equal(resumed.weight, whole.weight)
    losses = [[(r["train_loss"], r["val_loss"]) for r in one.history] for one in (trainer, reference)]
    assert losses[0] == losses[1]


def test_a_signal_to_a_worker_stops_all_ranks_too(tmp_path):
    with pytest.raises(TrainingInterrupted):
        fit(tmp_path, Send(2, to_worker=True), device="cpu:2", epochs=200)
    assert (tmp_path / "checkpoint" / "last.pt").exists()


@pytest.mark.parametrize("number", SIGNALS)
def test_each_signal_has_a_status_and_the_handlers_are_given_back(number):
    before = [signal.getsignal(one) for one in SIGNALS]
    with pytest.raises(TrainingInterrupted) as stopped:
        fit(None, Send(1, number))
    assert stopped.value.code == SIGNALS[number]
    assert [signal.getsignal(one) for one in SIGNALS] == before


def test_a_handler_of_the_program_keeps_its_signal():
    seen = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: seen.append(number))
    try:
        _, trainer = fit(None, Send(2, signal.SIGUSR1))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == [signal.SIGUSR1]
    assert len(trainer.history) == 2


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as after nohup
    try:
        assert len(fit(None, Send(2, signal.SIGHUP))[1].history) == 2
    finally:
        signal.signal(signal.SIGHUP, before)


PROGRAM = textwrap.dedent(
    """
    import os, signal, sys
    from pathlib import Path
    import torch, duoka
    from torch.utils.data import DataLoader, TensorDataset

    class Send(duoka.Callback):
        def on_step_end(self, state):
            if state.step == int(sys.argv[1]):
                os.kill(os.getpid(), signal.SIGTERM)

    data = DataLoader(TensorDataset(torch.randn(8, 2), torch.randn(8, 1)), batch_size=4)
    duoka.Trainer(
        torch.nn.Linear(2, 1), data, loss=torch.nn.functional.mse_loss, epochs=2, device="cpu", out_dir="run",
        callbacks=[Send()], verbose=False, tensorboard=False,
    ).fit()
    Path("end").touch()
    """
)


WITH_WORKERS = PROGRAM.replace("batch_size=4", "batch_size=4, num_workers=1").replace(
    "os.kill(os.getpid(), signal.SIGTERM)",  # another process sends it: torch's workers pass over those of their parent
    "os.system(f'kill -s {int(signal.SIGTERM)} -- -{os.getpgid(0)}')",
)


@pytest.mark.parametrize("number", ["SIGHUP", "SIGUSR1"])
def test_a_signal_to_the_process_group_leaves_the_data_workers(tmp_path, number):
    command = [sys.executable, "-c", WITH_WORKERS.replace("SIGTERM", number), "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, start_new_session=True)
    assert done.returncode == SIGNALS[getattr(signal, number)], done.stderr
    assert (tmp_path / "run" / "checkpoint" / "last.pt").exists()


def run_program(folder: Path, step: int) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", PROGRAM, str(step)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_a_script_ends_with_143_and_says_how_to_go_on(tmp_path):
    done = run_program(tmp_path, step=1)
    assert done.returncode == 143
    assert done.stderr == (
        "stopped by SIGTERM; Trainer(..., resume=True) continues from the checkpoint run/checkpoint/last.pt\n"
    )
    assert not (tmp_path / "end").exists()


def test_a_signal_after_the_last_step_ends_the_program_after_the_fit(tmp_path):
    done = run_program(tmp_path, step=4)
    assert done.returncode == -signal.SIGTERM
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert not (tmp_path / "end").exists()


def test_an_exception_says_how_to_go_on(tmp_path):
    class Fail(Callback):
        def on_step_end(self, state) -> None:
            if state.step == 4:
                raise ArithmeticError

    with pytest.raises(ArithmeticError) as failed:
        fit(tmp_path, Fail())
    (note,) = failed.value.__notes__
    assert note == f"Trainer(..., resume=True) continues from the checkpoint {tmp_path / 'checkpoint' / 'last.pt'}"


@pytest.mark.parametrize("device", ["cpu", "cpu:2"])
def test_training_ends_at_the_time_limit_and_resumes(tmp_path, device):
    whole, _ = fit(None, device=device, epochs=3)
    _, trainer = fit(tmp_path, device=device, epochs=3, max_hours=1e-9)
    assert trainer.stopped == "max_hours is over"
    assert trainer.history[-1]["step"] == 1
    resumed, _ = fit(tmp_path, device=device, epochs=3, resume=True)
    assert torch.equal(resumed.weight, whole.weight)


def test_an_evaluation_at_the_time_limit_is_no_best_of_a_resumed_run(tmp_path):
    def rising(output, target):  # the first weights are the best
        return -torch.nn.functional.cross_entropy(output, target)

    options = {"loss": rising, "monitor": "loss", "monitor_mode": "max", "epochs": 3}
    whole, _ = fit(None, **options)
    _, stopped = fit(tmp_path, max_hours=1e-9, **options)
    assert stopped.history[-1]["step"] == 1
    resumed, _ = fit(tmp_path, resume=True, **options)
    assert torch.equal(resumed.weight, whole.weight)


def test_the_time_limit_leaves_time_to_evaluate_and_save(monkeypatch):
    clock = [0.0]

    class TwoSeconds(Callback):
        def on_evaluate(self, _) -> None:
            clock[0] += 2.0

    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    _, trainer = fit(None, TwoSeconds(), epochs=50, max_hours=7 / 3600)
    assert (trainer.stopped, len(trainer.history), clock[0]) == ("max_hours is over", 3, 6.0)


def test_a_signal_during_an_evaluation_stops_after_it(tmp_path):
    class InEvaluation(Callback):
        def on_evaluate(self, _) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(TrainingInterrupted):
        fit(tmp_path, InEvaluation(), epochs=3)
    assert load_training(tmp_path / "checkpoint" / "last.pt")["state"]["step"] == 3


@pytest.mark.parametrize("device", ["cpu", "cpu:2"])
def test_a_checkpoint_is_written_when_the_last_one_is_old(tmp_path, device):
    class Fail(Callback):
        def on_step_end(self, state) -> None:
            if state.step == 3:
                raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fit(tmp_path, Fail(), device=device, checkpoint_minutes=1e-9)
    assert load_training(tmp_path / "checkpoint" / "last.pt")["state"]["step"] == 2
    with pytest.raises(ArithmeticError):
        fit(tmp_path / "none", Fail(), device=device, checkpoint_minutes=None)
    assert not (tmp_path / "none" / "checkpoint").exists()


def test_an_empty_resume_is_refused():
    with pytest.raises(ConfigError, match="resume='' is not valid"):
        trainer_of(resume="")


STUCK = textwrap.dedent(
    """
    import psutil, torch, duoka
    from torch.utils.data import DataLoader, TensorDataset

    class Stop(duoka.Callback):
        def on_step_end(self, state):
            if state.step == 2:
                for child in psutil.Process().children():
                    child.suspend()
                print("stopped", flush=True)

    data = DataLoader(TensorDataset(torch.randn(80, 2), torch.randn(80, 1)), batch_size=4)
    duoka.Trainer(
        torch.nn.Linear(2, 1), data, loss=torch.nn.functional.mse_loss, epochs=9, device="cpu:2", callbacks=[Stop()],
        verbose=False, tensorboard=False,
    ).fit()
    """
)


def test_a_second_signal_ends_a_fit_that_waits_for_a_stuck_worker(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", STUCK], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "stopped\n"
        (worker,) = worker_pids(process.pid)
        wait_until(lambda: psutil.Process(worker).status() == psutil.STATUS_STOPPED)
        wait_until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_SLEEPING)
        for _ in range(2):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.3)  # the kernel merges two signals that arrive at once
        assert process.wait(60) == 143
    wait_until_gone([worker])
