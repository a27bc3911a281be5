"""Time a step of ResNet-18 (64 images of 64x64, one thread) with memory as the GNU C library treats it, and in two other ways.

``duoka.malloc`` lets processes of the command line keep what they free, and gives helpers large pages. The same program
runs in each way, three times; all are started first, then take turns of a step, each round in an order that is drawn. Linux
with glibc only. Run ``python benchmarks/pages.py [--minutes 3]``.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import statistics
import subprocess
import sys
import time
from multiprocessing.connection import Listener
from pathlib import Path

import mirror

from duoka.malloc import with_large_pages

OTHERS = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
STARTS = 3
"""Of each way: how often memory is asked for anew depends on where a process happens to have its first."""
WAYS = {
    "as it is": {},
    "kept, as in duoka's commands": {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)},
    "large pages, as in helpers": with_large_pages({}),
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--minutes", type=float, default=3.0)
    minutes = options.parse_args().minutes
    program = [sys.executable, mirror.__file__, "--role", "one", "--address"]
    lines, processes = {}, {}
    try:
        for start, (way, environment) in itertools.product(range(STARTS), WAYS.items()):
            with Listener(family="AF_UNIX") as listener:
                mine = {**OTHERS, **environment}
                processes[way, start] = subprocess.Popen([*program, str(listener.address)], env=mine)
                lines[way, start] = [listener.accept()]
                lines[way, start][0].recv()
        before = {key: faults(process.pid) for key, process in processes.items()}
        times = mirror.measure(lines, time.monotonic() + 60 * minutes, random.Random(0))
        steps = 1 + len(times["as it is", 0])
        plain = statistics.median([step for start in range(STARTS) for step in times["as it is", start]])
        for way in WAYS:
            middles = sorted(statistics.median(times[way, start]) / plain for start in range(STARTS))
            pages = [(faults(processes[way, start].pid) - before[way, start]) // steps for start in range(STARTS)]
            each = ", ".join(f"{middle:.3f}" for middle in middles)
            share = statistics.median(step for start in range(STARTS) for step in times[way, start]) / plain
            print(
                f"{way:30} {share:.3f} of {plain * 1e3:.0f} ms (starts: {each}), {min(pages)} to {max(pages)} pages a step"
            )
    finally:
        for process in processes.values():
            process.terminate()
            process.wait()


def faults(pid: int) -> int:
    """Return how many pages the system has handed to a process (``man 5 proc``, ``minflt``)."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[7])


if __name__ == "__main__":
    main()
