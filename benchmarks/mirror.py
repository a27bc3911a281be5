"""Step time of ResNet-18 (64x64 images, 32 per device) on two devices: one device, lower bound, DDP, and duoka.

The lower bound is two independent processes that do the same work without communication. The
benchmark starts all contestants, then runs one step of each in turn, so that other load on the
machine affects all alike. It does so three times; ratios are medians over all rounds.

Run ``python benchmarks/mirror.py [--minutes 5] [--device cuda]``. With ``cuda`` a batch has 256
samples per device, and ``nn.DataParallel`` is a contestant too. On one GPU the two ranks share it if
NCCL allows that (``NCCL_MULTI_RANK_GPU_ENABLE=1``); otherwise the benchmark measures only what duoka
adds to the bare model.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener

PER_DEVICE, SIZE = {"cpu": 32, "cuda": 256}, 64
STEPS = {"cpu": 1, "cuda": 10}
"""Steps of a turn. On GPUs a step's broadcast may end after its turn, so a turn has more of them."""
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
Times = dict[str, list[float]]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--minutes", type=float, default=5.0)
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--per-device", type=int, help="samples of a device's part; default: 32 on CPUs, 256 on GPUs")
    options.add_argument("--starts", type=int, default=STARTS, help="how often all contestants start")
    options.add_argument(
        "--large-pages", action="store_true", help="use the large memory pages of duoka's workers in every contestant"
    )
    options.add_argument("--place", type=int, default=0, help=argparse.SUPPRESS)
    options.add_argument("--role", help=argparse.SUPPRESS)
    options.add_argument("--address", help=argparse.SUPPRESS)
    given = options.parse_args()
    per_device = given.per_device or PER_DEVICE[given.device]
    if given.role:
        run_contestant(given.role, given.address, given.device, given.place, per_device)
    else:
        if given.large_pages:
            from duoka.malloc import with_large_pages

            os.environ.update(with_large_pages({}))
        times, peaks = compare(given.minutes, given.device, per_device, starts=given.starts)
        show(times, given.device, per_device)
        show_memory(peaks)
        added = added_by_the_wrapper()
        print(f"with one device the wrapper adds {added:.1f} µs of Python per call, and no work on the device")


def compare(minutes: float, kind: str, per_device: int, *, starts: int = STARTS) -> tuple[Times, dict[str, int]]:
    """Return the times of the turns of each contestant, and the largest memory of its first process on its device."""
    several = ["limit", "limit", "ddp", "duoka"] if count(kind) > 1 else []
    roles = ["one", *several, "alone", "run", *(["dp"] if several and kind == "cuda" and is_apart() else [])]
    times: Times = {role: [] for role in roles}
    peaks: dict[str, int] = {}
    draw = random.Random(0)
    for _ in range(starts):
        measured, peaks = one_start(roles, 60 * minutes / starts, kind, per_device, draw)
        for role, steps in measured.items():
            times[role] += steps
    return times, peaks


def one_start(
    roles: list[str], seconds: float, kind: str, per_device: int, draw: random.Random
) -> tuple[Times, dict[str, int]]:
    """Start all contestants, and run their steps in turn for ``seconds``."""
    with Listener(family="AF_UNIX") as listener:
        processes = [
            start(role, str(listener.address), kind, roles[:place].count(role), per_device)
            for place, role in enumerate(roles)
        ]
        for role, process in zip(roles, processes, strict=True):
            threading.Thread(target=report_end, args=(role, process, str(listener.address)), daemon=True).start()
        try:
            ranks: dict[str, list[tuple[int, Connection]]] = {role: [] for role in roles}
            for _ in range(len(processes) + ("ddp" in roles) * (count(kind) - 1)):
                line = listener.accept()
                first = line.recv()
                if isinstance(first, Exception):
                    raise first
                role, rank = first
                ranks[role].append((rank, line))
            lines = {role: [line for _, line in sorted(found, key=lambda one: one[0])] for role, found in ranks.items()}
            times = measure(lines, time.monotonic() + seconds, draw, STEPS[kind])
            return times, {role: ask(own, 0)[0][1] for role, own in lines.items()}
        finally:
            for process in processes:
                process.terminate()
                process.wait()


def start(role: str, address: str, kind: str, place: int, per_device: int) -> subprocess.Popen[str]:
    launchers = {
        "ddp": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count(kind))],
        "run": ["-m", "duoka", "run", "--device", devices(kind)],
    }
    ours = ["--role", role, "--address", address, "--device", kind, "--place", str(place)]
    ours += ["--per-device", str(per_device)]
    command = [sys.executable, *launchers.get(role, []), __file__, *ours]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def report_end(role: str, process: subprocess.Popen[str], address: str) -> None:
    """Tell the benchmark that a contestant has ended before the benchmark ended it."""
    assert process.stderr is not None
    lines = process.stderr.read().splitlines()  # until the process ends
    with contextlib.suppress(OSError), Client(address) as line:
        line.send(RuntimeError("\n".join([f"{NAMES[role]} ended:", *lines[-20:]])))


def count(kind: str) -> int:
    """Return the number of ranks: two, or one on a machine with one GPU that NCCL does not let them share."""
    import torch

    from duoka.devices import nccl

    if kind == "cpu" or nccl.ranks_may_share_a_gpu():
        return 2
    return min(2, torch.cuda.device_count())


def is_apart() -> bool:
    import torch

    return torch.cuda.device_count() > 1


def device_index(rank: int) -> int:
    import torch

    return rank % torch.cuda.device_count()


def devices(kind: str) -> str:
    return "cpu:2" if kind == "cpu" else ",".join(str(device_index(rank)) for rank in range(count(kind)))


def measure(lines: dict[str, list[Connection]], end: float, draw: random.Random, steps: int) -> Times:
    """Run a step of each contestant in turn, in random order; a step's time is that of its slowest process.

    With a fixed order, a contestant that leaves a processor idle would always favor the same successor.
    """
    times: Times = {role: [] for role in lines}
    order = list(lines)
    for role in order:
        ask(lines[role], steps)  # warm-up
    while time.monotonic() < end or len(times[order[0]]) < 2:
        for role in order:
            times[role].append(max(seconds for seconds, _ in ask(lines[role], steps)))
        draw.shuffle(order)
    return times


def ask(lines: list[Connection], steps: int) -> list[tuple[float, int]]:
    """Let a contestant's processes run ``steps``; return the seconds of a step and the largest memory of each."""
    for line in lines:
        line.send(steps)
    return [line.recv() for line in lines]


def show(times: Times, kind: str, per_device: int) -> None:
    rounds = len(times["one"])
    lows = {role: statistics.quantiles(values, n=4)[0] for role, values in times.items()}
    where = "2 CPU workers with one thread each" if kind == "cpu" else "devices " + devices(kind)
    print(f"ResNet-18, {SIZE}x{SIZE} images, {per_device} per device, {where}, float32")
    print(f"{rounds} rounds of {STEPS[kind]} step each;", end=" ")
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(f"{'':46} {'median':>9} {'fastest':>9} {'quartiles':>17}")
    for role, values in times.items():
        _, middle, high = statistics.quantiles(values, n=4)
        low = lows[role]
        print(
            f"{NAMES[role]:46} {middle * 1e3:6.1f} ms {min(values) * 1e3:6.1f} ms {low * 1e3:7.1f}-{high * 1e3:.1f} ms"
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


def show_memory(peaks: dict[str, int]) -> None:
    for role, peak in peaks.items():
        if peak:
            print(f"{NAMES[role]:46} {peak / 2**20:8,.0f} MiB at most on the device of the first process")


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


def run_contestant(role: str, address: str, kind: str, place: int, per_device: int) -> None:
    import torch

    rank = int(os.environ.get("LOCAL_RANK", place))
    step = make_step(role, kind, rank, per_device)
    for _ in range(WARMUP_STEPS):
        step()
    with Client(address) as line:
        line.send((role, rank))
        while True:
            try:
                count = line.recv()
            except EOFError:
                return
            begin = time.perf_counter()
            for _ in range(count):
                step()
            seconds = (time.perf_counter() - begin) / max(count, 1)
            line.send((seconds, torch.cuda.max_memory_allocated() if kind == "cuda" else 0))


def make_step(role: str, kind: str, place: int, per_device: int) -> Callable[[], None]:
    import torch
    import torchvision
    from torch import nn

    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = torch.device("cpu" if kind == "cpu" else f"cuda:{device_index(place)}")
    if kind == "cuda":
        torch.cuda.set_device(device)  # for synchronize and max_memory_allocated
    model: nn.Module = torchvision.models.resnet18(num_classes=10).to(device)
    batch = per_device * (1 if role in ("limit", "ddp") else count(kind))
    images, labels = torch.randn(batch, 3, SIZE, SIZE, device=device), torch.randint(10, (batch,), device=device)
    if role == "ddp":
        torch.distributed.init_process_group("gloo" if kind == "cpu" else "nccl")
        model = nn.parallel.DistributedDataParallel(model, device_ids=None if kind == "cpu" else [device])
    elif role in ("duoka", "alone"):
        import duoka

        model = duoka.DataParallel(model, devices=str(device) if role == "alone" else devices(kind))
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
