"""One fault of two ranks on one GPU (or on CPU workers): when the caller knows, and whether the next step works.

``python benchmarks/gpu_faults.py NAME DEVICES`` causes a fault of ``FAULTS`` and prints a record as JSON. Part of
``benchmarks/gpu.py``.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

FAULTS = {
    "a worker killed in a backward": ("model", "dies"),
    "Ctrl-C while a worker computes": ("model", "sleeps"),
    "out of memory on a worker": ("model", "worker needs memory"),
    "out of memory on the first device": ("model", "first needs memory"),
    "a rank of a launch killed": ("launch", "dies"),
    "Ctrl-C in a launch": ("launch", "sleeps"),
}
"""Where each fault happens, and what the process does there."""
INTERRUPT_AFTER_S = 2.0
LIMIT_S = 80.0
"""Seconds after which a fault's process prints where it is, and ends."""
Act = Callable[[str], bool]
"""Does one step with a mood, and returns whether its result is right."""


def model_step(devices: str) -> Act:
    """Return a step of a ``DataParallel`` model."""
    import torch
    from torch import nn

    import duoka

    class Moody(nn.Linear):
        mood = ""
        owner = os.getpid()

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            outputs = super().forward(inputs)
            is_worker = os.getpid() != self.owner
            if self.mood == "sleeps" and is_worker:
                time.sleep(100)
            if self.mood == "dies" and is_worker:
                outputs.register_hook(lambda _: os.kill(os.getpid(), signal.SIGKILL))
            if self.mood == f"{'worker' if is_worker else 'first'} needs memory":
                outputs = outputs + torch.empty(1 << 44, device=outputs.device)[0]
            return outputs

    device = torch.device("cpu" if "cpu" in devices else "cuda:0")
    module = Moody(16, 1).to(device)
    model = duoka.DataParallel(module, devices=devices)
    inputs = torch.ones(64, 16, device=device)

    def act(mood: str) -> bool:
        module.mood = mood
        module.zero_grad()
        model(inputs).sum().backward()
        assert module.weight.grad is not None
        return module.weight.grad.eq(64).all().item() is True

    return act


def launch_step(devices: str) -> Act:
    """Return a launch of two all-reduces."""
    import torch

    import duoka

    def on_rank(mood: str) -> float:
        world = duoka.current_world()
        if world.rank:
            faulthandler.dump_traceback_later(LIMIT_S / 2, file=open("worker.log", "w"))  # noqa: SIM115
        total = world.all_reduce(torch.ones(4, device=world.device))
        if mood == "dies" and world.rank:
            os.kill(os.getpid(), signal.SIGKILL)
        if mood == "sleeps" and world.rank:
            time.sleep(100)
        return float(world.all_reduce(total)[0])

    return lambda mood: bool(duoka.launch(on_rank, mood, devices=devices) == 4)


def say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, flush=True)


def main(name: str, devices: str) -> None:
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    where, mood = FAULTS[name]
    act = (model_step if where == "model" else launch_step)(devices)
    for number in range(9 if where == "model" else 2):  # a model is checked at its first calls
        began = time.monotonic()
        assert act("")
        say(f"step {number}: {time.monotonic() - began:.2f} s")
    began = time.monotonic()
    if "Ctrl-C" in name:
        threading.Timer(INTERRUPT_AFTER_S, os.kill, (os.getpid(), signal.SIGINT)).start()
        began += INTERRUPT_AFTER_S
    try:
        act(mood)
        seen = "nothing"
    except BaseException as error:
        seen = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    known = time.monotonic() - began
    say(f"known after {known:.2f} s: {seen:.80}")
    began = time.monotonic()
    works = act("")
    again = time.monotonic() - began
    print(json.dumps({"known after, s": known, "seen": seen, "works again": works, "next step, s": again}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
