"""Step time of ResNet-18 (64x64 images, 32 per device) on two devices: one device, lower bound, DDP, and duoka.

The lower bound is two independent processes that do the same work without communication. The
benchmark starts all contestants, then runs one step of each in turn, so that other load on the
machine affects all alike. It does so three times; ratios are medians over all rounds.

Run ``python benchmarks/mirror.py [--minutes 5] [--device cuda]``. With ``cuda`` (not run yet) a
batch has 256 samples per device, and ``nn.DataParallel`` is a contestant too. With one GPU, the
benchmark measures only what duoka adds to the bare model.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener

PER_DEVICE, SIZE, STEPS = {"cpu": 32, "cuda": 256}, 64, 1
STARTS = 3
"""The placement of a process's memory changes its speed by up to a tenth, for as long as it runs."""
WARMUP_STEPS = 8
"""Warm-up steps: `duoka run` computes the first batches whole, and checks the model at calls 1, 2, 4 and 8."""
NAMES = {
    "one": "one device (CPU: one thread), the whole batch",
    "limit": "two processes without communication",
    "ddp": "DistributedDataParallel, torchrun",
    "duoka": "duoka.DataParallel",
    "alone": "duoka.DataParallel on one device, the whole batch",
    "run": "a one-device script under `duoka run`",
    "dp": "nn.DataParallel",
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--minutes", type=float, default=5.0)
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument(
        "--large-pages", action="store_true", help="use the large memory pages of duoka's workers in every contestant"
    )
    options.add_argument("--place", type=int, default=0, help=argparse.SUPPRESS)
    options.add_argument("--role", help=argparse.SUPPRESS)
    options.add_argument("--address", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.role:
        run_contestant(given.role, given.address, given.device, given.place)
    else:
        if given.large_pages:
            from duoka.malloc import with_large_pages

            os.environ.update(with_large_pages({}))
        compare(given.minutes, given.device)


def compare(minutes: float, kind: str) -> None:
    several = ["limit", "limit", "ddp", "duoka"] if count(kind) > 1 else []
    roles = ["one", *several, "alone", "run", *(["dp"] if several and kind == "cuda" else [])]
    times: dict[str, list[float]] = {role: [] for role in roles}
    draw = random.Random(0)
    for _ in range(STARTS):
        for role, steps in one_start(roles, 60 * minutes / STARTS, kind, draw).items():
            times[role] += steps
    show(times, kind)
    added = added_by_the_wrapper()
    print(f"with one device the wrapper adds {added:.1f} µs of Python per call, and no work on the device")


def one_start(roles: list[str], seconds: float, kind: str, draw: random.Random) -> dict[str, list[float]]:
    """Start all contestants, and run their steps in turn for ``seconds``."""
    with Listener(family="AF_UNIX") as listener:
        processes = [
            start(role, str(listener.address), kind, roles[:place].count(role)) for place, role in enumerate(roles)
        ]
        try:
            lines: dict[str, list[Connection]] = {role: [] for role in roles}
            for _ in range(len(processes) + ("ddp" in roles)):
                line = listener.accept()
                lines[line.recv()].append(line)
            return measure(lines, time.monotonic() + seconds, draw)
        finally:
            for process in processes:
                process.terminate()
                process.wait()


def start(role: str, address: str, kind: str, place: int) -> subprocess.Popen[bytes]:
    launchers = {
        "ddp": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count(kind))],
        "run": ["-m", "duoka", "run", "--device", devices(kind)],
    }
    ours = ["--role", role, "--address", address, "--device", kind, "--place", str(place)]
    command = [sys.executable, *launchers.get(role, []), __file__, *ours]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL)


def count(kind: str) -> int:
    """Return the number of devices: two, or one if the machine has one GPU."""
    import torch

    return 2 if kind == "cpu" else min(2, torch.cuda.device_count())


def devices(kind: str) -> str:
    return "cpu:2" if kind == "cpu" else ",".join(map(str, range(count(kind))))


def measure(lines: dict[str, list[Connection]], end: float, draw: random.Random) -> dict[str, list[float]]:
    """Run a step of each contestant in turn, in random order; a step's time is that of its slowest process.

    With a fixed order, a contestant that leaves a processor idle would always favor the same successor.
    """
    times: dict[str, list[float]] = {role: [] for role in lines}
    order = list(lines)
    for role in order:
        turn(lines[role])  # warm-up
    while time.monotonic() < end:
        for role in order:
            times[role].append(turn(lines[role]))
        draw.shuffle(order)
    return times


def turn(lines: list[Connection]) -> float:
    for line in lines:
        line.send(STEPS)
    return max(line.recv() for line in lines)


def show(times: dict[str, list[float]], kind: str) -> None:
    rounds = len(times["one"])
    lows = {role: statistics.quantiles(values, n=4)[0] for role, values in times.items()}
    where = "2 CPU workers with one thread each" if kind == "cpu" else f"{count(kind)} GPU(s)"
    print(f"ResNet-18, {SIZE}x{SIZE} images, {PER_DEVICE[kind]} per device, {where}, float32")
    print(f"{rounds} rounds of {STEPS} step each, over {STARTS} starts;", end=" ")
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(f"{'':46} {'median':>9} {'fastest':>9} {'quartiles':>17}")
    for role, values in times.items():
        _, middle, high = statistics.quantiles(values, n=4)
        low = lows[role]
        print(
            f"{NAMES[role]:46} {middle * 1e3:6.0f} ms {min(values) * 1e3:6.0f} ms {low * 1e3:7.0f}-{high * 1e3:.0f} ms"
        )
    for ours, others in (
        ("duoka", ("ddp", "limit", "one", "dp")),
        ("run", ("ddp", "limit", "one", "dp")),
        ("alone", ("one",)),
    ):
        for role in others:
            if not times.keys() >= {ours, role}:
                continue
            ratios = [own / other for own, other in zip(times[ours], times[role], strict=True)]
            quiet, fastest = lows[ours] / lows[role], min(times[ours]) / min(times[role])
            print(
                f"{ours} / {role}: {statistics.median(ratios):.3f} (median of rounds), {quiet:.3f} (lower quartiles), "
                f"{fastest:.3f} (fastest of each)"
            )


def added_by_the_wrapper(calls: int = 20_000) -> float:
    """Return the microseconds of Python that the wrapper adds to a call on one device: the median of nine runs."""
    import torch

    import duoka

    bare, value = torch.nn.Identity(), torch.zeros(1)
    wrapped = duoka.DataParallel(bare, devices="cpu")
    differences = []
    for _ in range(9):
        times = []
        for model in (bare, wrapped):
            begin = time.perf_counter()
            for _ in range(calls):
                model(value)
            times.append(time.perf_counter() - begin)
        differences.append((times[1] - times[0]) / calls)
    return 1e6 * statistics.median(differences)


def run_contestant(role: str, address: str, kind: str, place: int) -> None:
    step = make_step(role, kind, int(os.environ.get("LOCAL_RANK", place)))
    for _ in range(WARMUP_STEPS):
        step()
    with Client(address) as line:
        line.send(role)
        while True:
            try:
                count = line.recv()
            except EOFError:
                return
            begin = time.perf_counter()
            for _ in range(count):
                step()
            line.send((time.perf_counter() - begin) / count)


def make_step(role: str, kind: str, place: int) -> Callable[[], None]:
    import torch
    import torchvision
    from torch import nn

    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = torch.device("cpu" if kind == "cpu" else f"cuda:{place}")
    model: nn.Module = torchvision.models.resnet18(num_classes=10).to(device)
    batch = PER_DEVICE[kind] * (1 if role in ("limit", "ddp") else count(kind))
    images, labels = torch.randn(batch, 3, SIZE, SIZE, device=device), torch.randint(10, (batch,), device=device)
    if role == "ddp":
        torch.distributed.init_process_group("gloo" if kind == "cpu" else "nccl")
        model = nn.parallel.DistributedDataParallel(model, device_ids=None if kind == "cpu" else [place])
    elif role in ("duoka", "alone"):
        import duoka

        model = duoka.DataParallel(model, devices=devices(kind) if role == "duoka" else str(device))
    elif role == "dp":
        model = nn.DataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        if kind == "cuda":
            torch.cuda.synchronize()

    return step


if __name__ == "__main__":
    main()
