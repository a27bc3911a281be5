"""CPU cores, threads and DataLoader workers: laws that must hold, control-group files, and the real machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from duoka.devices.cpu import available_cores, core_limits, loader_workers, threads_per_rank
from duoka.errors import ConfigError


def test_workers_use_no_more_than_the_cores_left_by_the_devices() -> None:
    for cores in range(1, 40):
        for devices in range(1, 9):
            for requested in (None, 0, 1, 3, 8, 16, 1000):
                workers = loader_workers(devices, requested, cores)
                assert workers.total <= max(0, cores - devices)
                assert workers.total == workers.per_device * devices
                wanted = 4 * devices if requested is None else requested
                if cores >= wanted + 2 * devices:
                    assert wanted <= workers.total < wanted + devices


@pytest.mark.parametrize(
    ("devices", "requested", "cores", "reason"),
    [
        (1, 8, 32, "8 per device: 8 requested, which 32 cores allow"),
        (2, 16, 32, "8 per device: 16 requested, which 32 cores allow"),
        (2, 16, 8, "3 per device: 16 requested, 8 cores minus 1 for each of 2 devices leave 6"),
        (1, None, 2, "1 per device: the default, 2 cores minus 1 for the device leave 1"),
        (1, 1, 2, "1 per device: 1 requested, which 2 cores allow"),
        (2, None, 32, "4 per device: the default, which 32 cores allow"),
        (1, 0, 8, "none, each device's own process loads its batches: 0 requested"),
    ],
)
def test_the_number_of_workers_has_a_reason(devices: int, requested: int | None, cores: int, reason: str) -> None:
    assert loader_workers(devices, requested, cores).reason == reason


def test_threads_of_all_ranks_fit_the_cores_and_every_rank_has_one() -> None:
    for cores in range(1, 20):
        for ranks in range(1, 20):
            threads = threads_per_rank(ranks, cores)
            assert threads == 1 or threads * ranks <= cores
            assert (threads + 1) * ranks > cores


def write_files(root: Path, **files: str) -> Path:
    """Write files below ``root``; ``__`` in a name stands for a slash and ``_DOT_`` for a dot."""
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "count"),
    [
        ({}, 16),
        ({"proc__self__cgroup": "0::/\n", "sys__fs__cgroup__cpu_DOT_max": "max 100000\n"}, 16),
        ({"proc__self__cgroup": "0::/\n", "sys__fs__cgroup__cpu_DOT_max": "400000 100000\n"}, 4),
        ({"proc__self__cgroup": "0::/\n", "sys__fs__cgroup__cpu_DOT_max": "150000 100000\n"}, 1),
        ({"proc__self__cgroup": "0::/\n", "sys__fs__cgroup__cpu_DOT_max": "50000 100000\n"}, 1),
        ({"proc__self__cgroup": "0::/\n", "sys__fs__cgroup__cpu_DOT_max": "6400000 100000\n"}, 16),
        ({"proc__self__cgroup": "0::/\n", "sys__fs__cgroup__cpu_DOT_max": "damaged"}, 16),
        (
            {
                "proc__self__cgroup": "0::/pod/task\n",
                "sys__fs__cgroup__pod__cpu_DOT_max": "300000 100000\n",
                "sys__fs__cgroup__pod__task__cpu_DOT_max": "max 100000\n",
            },
            3,
        ),
        (
            {
                "proc__self__cgroup": "7:memory:/docker/1\n4:cpu,cpuacct:/docker/1\n0::/\n",
                "sys__fs__cgroup__cpu,cpuacct__cpu_DOT_cfs_quota_us": "250000\n",
                "sys__fs__cgroup__cpu,cpuacct__cpu_DOT_cfs_period_us": "50000\n",
            },
            5,
        ),
        (
            {
                "proc__self__cgroup": "4:cpu:/\n",
                "sys__fs__cgroup__cpu__cpu_DOT_cfs_quota_us": "-1\n",
                "sys__fs__cgroup__cpu__cpu_DOT_cfs_period_us": "100000\n",
            },
            16,
        ),
    ],
)
def test_a_quota_of_a_control_group_limits_the_cores(tmp_path: Path, files: dict[str, str], count: int) -> None:
    cores = core_limits(write_files(tmp_path, **files), affinity=16)
    assert cores.count == count
    assert ("quota" in cores.reason) == (count < 16)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_affinity_limits_the_cores() -> None:
    program = (
        "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]);"
        "from duoka.devices.cpu import available_cores; print(available_cores())"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "1"


def test_this_machine_has_at_least_one_core() -> None:
    assert 1 <= available_cores() <= (os.cpu_count() or 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: loader_workers(0), "devices=0"),
        (lambda: loader_workers(1, -2), "num_workers=-2"),
        (lambda: loader_workers(1, 2, 0), "cores=0"),
        (lambda: threads_per_rank(0), "ranks=0"),
    ],
)
def test_a_count_out_of_range_is_named(call: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()  # type: ignore[operator]
