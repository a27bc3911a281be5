"""Time it takes to have a function running on two CPU processes: duoka cold and warm, torchrun, torchrunx, accelerate.

Two questions, measured in turn, round after round, so that whatever else the machine does meets all of them:

- from the shell: the whole life of a command that starts two ranks, lets them meet in one all-reduce, and ends;
- from a running process that has torch imported (a notebook): the call that does the same. ``duoka, warm`` is every call
  after the first. Accelerate's ``notebook_launcher`` starts one process only where there is no GPU, so on a CPU it is
  its ``debug_launcher`` that is measured. Both of accelerate's fork, so they start fast, and refuse to start once CUDA is
  initialised.

    python benchmarks/launch.py [--rounds 5]
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

RANKS = 2
WARM_CALLS = 20


def meet() -> float:
    """What every rank runs: one all-reduce with the others."""
    import torch
    import torch.distributed as dist

    total = torch.ones(1)
    dist.all_reduce(total)
    return total.item()


def meet_in_a_group_of_its_own() -> None:
    """The same as a script for torchrun has it."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    meet()
    dist.destroy_process_group()


def meet_by_accelerate() -> None:
    """The same as a function for accelerate's launchers has it."""
    import accelerate

    accelerate.PartialState(cpu=True)
    meet()


def call_duoka() -> None:
    import duoka

    assert duoka.launch(meet, devices=f"cpu:{RANKS}") == RANKS


def call_torchrunx() -> None:
    import torchrunx

    launcher = torchrunx.Launcher(hostnames=["localhost"], workers_per_host=RANKS, backend="gloo")
    assert launcher.run(meet).rank(0) == RANKS


def call_accelerate() -> None:
    import accelerate

    with contextlib.redirect_stdout(io.StringIO()):
        accelerate.debug_launcher(meet_by_accelerate, num_processes=RANKS)


CALLS: dict[str, Callable[[], None]] = {
    "duoka": call_duoka,
    "torchrunx": call_torchrunx,
    "accelerate": call_accelerate,
}


def seconds_of_call(name: str) -> dict[str, float]:
    """In this process, torch being imported: the first call, and the median of later ones where they differ."""
    import torch  # noqa: F401 - what a notebook has done long before

    importlib.import_module(name)
    times = []
    for _ in range(WARM_CALLS if name == "duoka" else 1):
        start = time.perf_counter()
        CALLS[name]()
        times.append(time.perf_counter() - start)
    warm = {f"{name}, warm": statistics.median(times[1:])} if times[1:] else {}
    return {f"{name}, cold" if warm else name: times[0], **warm}


def seconds_of_command(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return time.perf_counter() - start


def measure_once(installed: list[str]) -> tuple[dict[str, float], dict[str, float]]:
    """One round of both questions, each thing in a fresh process."""
    here = [sys.executable, __file__]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    shell = {
        "python, duoka.launch inside": seconds_of_command([*here, "--only", "duoka-once"]),
        "torchrun": seconds_of_command([*torchrun, __file__, "--only", "torchrun"]),
    }
    inside: dict[str, float] = {}
    for name in installed:
        done = subprocess.run([*here, "--only", name], check=True, capture_output=True, text=True)
        inside |= json.loads(done.stdout.splitlines()[-1])
    return shell, inside


def table(title: str, rounds: list[dict[str, float]], reference: str) -> None:
    """Print the median of each, and the median over rounds of its ratio to ``reference`` in the same round."""
    print(f"\n{title}\n{'':30}{'median s':>10}{'least s':>10}{f'/ {reference}':>16}")
    for name in rounds[0]:
        times = [one[name] for one in rounds]
        ratio = statistics.median(one[name] / one[reference] for one in rounds)
        print(f"{name:30}{statistics.median(times):10.3f}{min(times):10.3f}{ratio:16.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only == "torchrun":
        meet_in_a_group_of_its_own()
    elif options.only == "duoka-once":
        call_duoka()
    elif options.only:
        print(json.dumps(seconds_of_call(options.only)))
    else:
        compare(options.rounds)


def compare(count: int) -> None:
    import torch

    installed = [name for name in CALLS if importlib.util.find_spec(name)]
    print(
        f"{RANKS} CPU ranks, gloo; {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"
    )
    print(f"not installed: {', '.join(sorted(CALLS.keys() - set(installed))) or 'none'}; {count} rounds, interleaved")
    rounds = [measure_once(installed) for _ in range(count)]
    table("From the shell: one command, from start to end", [shell for shell, _ in rounds], "torchrun")
    table("From a running process: one call", [inside for _, inside in rounds], "duoka, cold")


if __name__ == "__main__":
    main()
