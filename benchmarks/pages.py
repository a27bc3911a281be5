"""Step time of ResNet-18 (64 images of 64x64, one thread) with three settings of glibc's memory allocator.

``duoka.malloc`` makes command-line processes keep freed memory, and gives workers large pages. The
benchmark starts the same program three times with each setting, then runs one step of each in turn,
in random order. Linux with glibc only. Run ``python benchmarks/pages.py [--minutes 3]``.
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
"""Starts of each setting: the number of new pages depends on the placement of a process's first ones."""
SETTINGS = {
    "default": {},
    "freed memory kept (commands)": {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)},
    "large pages (workers)": with_large_pages({}),
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--minutes", type=float, default=3.0)
    minutes = options.parse_args().minutes
    program = [sys.executable, mirror.__file__, "--role", "one", "--address"]
    lines, processes = {}, {}
    try:
        for start, (setting, environment) in itertools.product(range(STARTS), SETTINGS.items()):
            with Listener(family="AF_UNIX") as listener:
                mine = {**OTHERS, **environment}
                processes[setting, start] = subprocess.Popen([*program, str(listener.address)], env=mine)
                lines[setting, start] = [listener.accept()]
                lines[setting, start][0].recv()
        before = {key: faults(process.pid) for key, process in processes.items()}
        times = mirror.measure(lines, time.monotonic() + 60 * minutes, random.Random(0), mirror.STEPS["cpu"])
        steps = 1 + len(times["default", 0])
        plain = statistics.median([step for start in range(STARTS) for step in times["default", start]])
        for setting in SETTINGS:
            middles = sorted(statistics.median(times[setting, start]) / plain for start in range(STARTS))
            pages = [
                (faults(processes[setting, start].pid) - before[setting, start]) // steps for start in range(STARTS)
            ]
            each = ", ".join(f"{middle:.3f}" for middle in middles)
            share = statistics.median(step for start in range(STARTS) for step in times[setting, start]) / plain
            print(
                f"{setting:30} {share:.3f} of {plain * 1e3:.0f} ms (starts: {each}), "
                f"{min(pages)} to {max(pages)} new pages per step"
            )
    finally:
        for process in processes.values():
            process.terminate()
            process.wait()


def faults(pid: int) -> int:
    """Return the number of pages that a process has received (``man 5 proc``, ``minflt``)."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[7])


if __name__ == "__main__":
    main()
