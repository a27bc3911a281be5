"""Trains a tiny model and inflicts one fault on itself; a server that forks a process for each order on its input.

An order is a line of JSON: the way to train, the folder, the fault, and the step at which it comes. The answer is the
process id, then the exit status. What a process learned lies in its folder: ``first`` (its first step) and ``end.pt``.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

import duoka
from duoka.errors import WorkerDied

NUM_STEPS, EVERY = 12, 2
"""Steps of a run, and from one checkpoint to the next."""


def worker_pids() -> list[int]:
    return [child.pid for child in psutil.Process().children() if "worker_main" in " ".join(child.cmdline())]


def send_to_worker(number: int) -> None:
    for pid in worker_pids()[-1:]:
        os.kill(pid, number)


def stop_worker_for_a_moment() -> None:
    for pid in worker_pids()[-1:]:
        os.kill(pid, signal.SIGSTOP)
        threading.Timer(0.3, os.kill, (pid, signal.SIGCONT)).start()


def empty_temporary_folder() -> None:
    for path in Path(tempfile.gettempdir()).iterdir():
        shutil.rmtree(path, ignore_errors=True)


def limit_files() -> None:
    """Let every write beyond a kilobyte fail, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))


def fail() -> None:
    raise ArithmeticError("the fault")


FAULTS: dict[str, Callable[[], None]] = {
    "none": lambda: None,
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "SIGHUP": lambda: os.kill(os.getpid(), signal.SIGHUP),
    "SIGUSR1": lambda: os.kill(os.getpid(), signal.SIGUSR1),
    "Ctrl-C": lambda: os.kill(os.getpid(), signal.SIGINT),
    "exception": fail,
    "worker killed": lambda: send_to_worker(signal.SIGKILL),
    "worker stopped": stop_worker_for_a_moment,
    "temporary folder emptied": empty_temporary_folder,
    "full disk": limit_files,
}


class Inflict(duoka.Callback):
    """Notes the first step, and inflicts the fault after a step of rank 0."""

    def __init__(self, order: dict[str, Any]) -> None:
        self.order = order

    def on_step_end(self, state: Any) -> None:
        if duoka.current_world().rank:
            return
        first = Path(self.order["folder"], "first")
        if not first.exists():
            first.write_text(str(state.step))
        if state.step == self.order["step"]:
            FAULTS[self.order["fault"]]()


def make_model() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Dropout(0.1), nn.Linear(40, 1))


def make_data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(6)
    return torch.randn(NUM_STEPS * 4, 6, generator=generator), torch.randn(NUM_STEPS * 4, 1, generator=generator)


def train_with_trainer(order: dict[str, Any]) -> nn.Module:
    model = make_model()
    data = torch.utils.data.TensorDataset(*make_data())
    duoka.Trainer(
        model,
        torch.utils.data.DataLoader(data, batch_size=8, shuffle=True),
        loss=nn.functional.mse_loss,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
        epochs=2,
        seed=1,
        device=order["device"],
        out_dir=f"{order['folder']}/run",
        checkpoint_every_steps=EVERY,
        resume="auto",
        callbacks=[Inflict(order)],
        verbose=False,
        tensorboard=False,
    ).fit()
    return model


def train_with_wrapped_model(order: dict[str, Any]) -> nn.Module:
    """Take the steps of a loop; a step whose worker has died is taken again."""
    module, (inputs, targets) = make_model().eval(), make_data()
    model = duoka.DataParallel(module, devices=order["device"], check="off")
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    for step, part in enumerate(inputs.split(4), start=1):
        if step == order["step"]:
            FAULTS[order["fault"]]()
        for _ in range(2):
            optimizer.zero_grad()
            with contextlib.suppress(WorkerDied):
                nn.functional.mse_loss(model(part), targets[4 * step - 4 : 4 * step]).backward()
                break
        optimizer.step()
    model.close()
    return module


def take_distributed_steps(order: dict[str, Any]) -> nn.Module:
    world, model, (inputs, targets) = duoka.current_world(), make_model().eval(), make_data()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(1, NUM_STEPS + 1):
        if world.rank == 0 and step == order["step"]:
            FAULTS[order["fault"]]()
        part = slice(4 * step - 4 + world.rank, 4 * step, world.size)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs[part]), targets[part]).backward()
        for parameter in model.parameters():
            torch.distributed.all_reduce(parameter.grad)
        optimizer.step()
    return model


def train_with_launch(order: dict[str, Any]) -> nn.Module:
    """Launch; again if a worker has died."""
    with contextlib.suppress(WorkerDied):
        return duoka.launch(take_distributed_steps, order, devices=order["device"])
    return duoka.launch(take_distributed_steps, order | {"step": 0}, devices=order["device"])


WAYS = {"Trainer": train_with_trainer, "DataParallel": train_with_wrapped_model, "launch": train_with_launch}


def obey(order: dict[str, Any]) -> None:
    """Train in this process, which has just been forked."""
    folder = Path(order["folder"])
    os.environ["DUOKA_SOAK"] = order["folder"]
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder / "tmp")
    sys.stdout = sys.stderr = (folder / "log.txt").open("a", buffering=1)
    os.dup2(sys.stderr.fileno(), 1)
    os.dup2(sys.stderr.fileno(), 2)
    torch.set_num_threads(1)
    (folder / "first").unlink(missing_ok=True)
    model = WAYS[order["way"]](order)
    duoka.close_workers()
    torch.save(model.state_dict(), folder / "end.pt")


def main() -> None:
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            sys.stdin.close()
            os.setsid()
            status = 0
            try:
                obey(json.loads(line))
            except SystemExit as stop:
                print(stop, file=sys.stderr)
                status = int(stop.code or 0)
            except BaseException:
                traceback.print_exc()
                status = 1
            os._exit(status)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
