"""Start-up time of a function on two CPU processes: duoka cold and warm, torchrun, torchrunx, accelerate.

Two measurements, interleaved over several rounds, so that other load on the machine affects all of them:

- from the shell: a command that starts two ranks, runs one all-reduce, and ends;
- from a running process that has imported torch (a notebook): a call that does the same. ``duoka, warm`` is every call
  after the first. Accelerate's ``notebook_launcher`` starts a single process on a machine without a GPU, so the
  benchmark measures its ``debug_launcher``. Both fork, so they start fast, and fail once CUDA is initialized.

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


def all_reduce() -> float:
    """The function that every rank runs."""
    import torch
    import torch.distributed as dist

    total = torch.ones(1)
    dist.all_reduce(total)
    return total.item()


def all_reduce_in_new_group() -> None:
    """The same, as a script for torchrun."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    all_reduce()
    dist.destroy_process_group()


def all_reduce_with_accelerate() -> None:
    """The same, as a function for accelerate's launchers."""
    import accelerate

    accelerate.PartialState(cpu=True)
    all_reduce()


def call_duoka() -> None:
    import duoka

    assert duoka.launch(all_reduce, devices=f"cpu:{RANKS}") == RANKS


def call_torchrunx() -> None:
    import torchrunx

    launcher = torchrunx.Launcher(hostnames=["localhost"], workers_per_host=RANKS, backend="gloo")
    assert launcher.run(all_reduce).rank(0) == RANKS


def call_accelerate() -> None:
    import accelerate

    with contextlib.redirect_stdout(io.StringIO()):
        accelerate.debug_launcher(all_reduce_with_accelerate, num_processes=RANKS)


CALLS: dict[str, Callable[[], None]] = {
    "duoka": call_duoka,
    "torchrunx": call_torchrunx,
    "accelerate": call_accelerate,
}


def seconds_of_call(name: str) -> dict[str, float]:
    """Measure in this process, after torch's import: the first call, and the median of later ones for duoka."""
    import torch  # noqa: F401 - a notebook has imported it before

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
    """Run one round of both measurements, each in a fresh process."""
    this_file = [sys.executable, __file__]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    shell = {
        "python, duoka.launch inside": seconds_of_command([*this_file, "--only", "duoka-once"]),
        "torchrun": seconds_of_command([*torchrun, __file__, "--only", "torchrun"]),
    }
    inside: dict[str, float] = {}
    for name in installed:
        done = subprocess.run([*this_file, "--only", name], check=True, capture_output=True, text=True)
        inside |= json.loads(done.stdout.splitlines()[-1])
    return shell, inside


def table(title: str, rounds: list[dict[str, float]], reference: str) -> None:
    """Print each median, and the median ratio to ``reference`` within a round."""
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
        all_reduce_in_new_group()
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
