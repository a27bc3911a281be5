"""Scaling arithmetic: compared with torch's own split, with laws that must hold, and with control-group files."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from duoka import scaling
from duoka.errors import ConfigError
from duoka.scaling import Batch, LearningRate, core_limits, loader_workers, split, threads_per_rank


def test_parts_are_those_of_tensor_split() -> None:
    for count in range(40):
        for parts in range(1, 9):
            expected = tuple(len(part) for part in torch.arange(count).tensor_split(parts))
            assert split(count, parts) == expected


@pytest.mark.parametrize("mode", ["per_device", "global"])
def test_the_parts_of_all_devices_are_the_global_batch(mode: str) -> None:
    for devices in range(1, 6):
        for accumulate in range(1, 4):
            batch = Batch(31, devices, mode, accumulate)
            assert sum(batch.device_parts) == batch.global_batch
            assert batch.global_batch == (31 if mode == "global" else 31 * devices * accumulate)
            assert batch.micro_batch == math.ceil(batch.global_batch / (devices * accumulate))
            assert batch.global_batch == Batch(31, 1, mode, accumulate).global_batch * batch.growth


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (Batch(256), "256 per device x 1 device = 256 global"),
        (Batch(256, 2), "256 per device x 2 devices = 512 global"),
        (Batch(64, 2, accumulate=4), "64 per device x 2 devices x 4 accumulated = 512 global"),
        (Batch(256, 1, "global"), "256 global on 1 device"),
        (Batch(256, 2, "global"), "256 global = 128 per device x 2 devices"),
        (Batch(11, 3, "global"), "11 global = 4 + 4 + 3 on 3 devices"),
        (Batch(11, 3, "global", 2), "11 global = 1 to 2 per device x 3 devices x 2 accumulated"),
        (Batch(100, 16, "global"), "100 global = 6 to 7 per device x 16 devices"),
    ],
)
def test_batch_arithmetic_is_told_in_words(batch: Batch, words: str) -> None:
    assert batch.words == words


@pytest.mark.parametrize(
    ("lr", "scaled", "words"),
    [
        (LearningRate(0.1), 0.1, "lr 0.1"),
        (LearningRate(0.1, 2), 0.1, "lr 0.1"),
        (LearningRate(0.1, 2, "linear", warmup_epochs=5), 0.2, "lr 0.1 -> 0.2 (linear), 5 warm-up epochs"),
        (LearningRate(0.1, 3, "linear", warmup_steps=1), 0.3, "lr 0.1 -> 0.3 (linear), 1 warm-up step"),
        (LearningRate(0.001, 4, "sqrt", warmup_epochs=1), 0.002, "lr 0.001 -> 0.002 (sqrt), 1 warm-up epoch"),
        (LearningRate(0.1, 1, "linear", warmup_epochs=0.5), 0.1, "lr 0.1, 0.5 warm-up epochs"),
    ],
)
def test_learning_rate_follows_the_rule_and_is_told_in_words(lr: LearningRate, scaled: float, words: str) -> None:
    assert lr.scaled == pytest.approx(scaled, rel=1e-12)
    assert lr.words == words


@pytest.mark.parametrize(
    ("lr", "start"), [(LearningRate(0.1, 4, "linear", 0.5), 0.1), (LearningRate(0.1, warmup_steps=10), 0.0)]
)
def test_warm_up_is_a_straight_line_that_ends_at_the_scaled_rate(lr: LearningRate, start: float) -> None:
    steps = lr.steps(20)
    assert steps == 10
    rates = [lr.at(step, 20) for step in range(steps)]
    assert rates == pytest.approx([start + (lr.scaled - start) * (step + 1) / 10 for step in range(10)], rel=1e-12)
    assert {lr.at(step, 20) for step in (9, 10, 1000)} == {lr.scaled}


def test_without_warm_up_the_first_step_has_the_scaled_rate() -> None:
    assert LearningRate(0.1, 2, "linear").at(0, 20) == 0.2


def test_workers_never_exceed_the_cores_that_the_devices_leave() -> None:
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
    ("devices", "requested", "cores", "words"),
    [
        (1, 8, 32, "8 per device: 8 were asked for, and 32 cores allow it"),
        (2, 16, 32, "8 per device: 16 were asked for, and 32 cores allow it"),
        (2, 16, 8, "3 per device: 16 were asked for, and 8 cores less 1 for each of 2 devices leave 6"),
        (1, None, 2, "1 per device: nothing was asked for, and 2 cores less 1 for the device leave 1"),
        (2, None, 32, "4 per device: nothing was asked for, and 32 cores allow it"),
        (1, 0, 8, "none, each device's own process loads: 0 were asked for"),
        (
            2,
            1,
            2,
            "none, each device's own process loads: 1 was asked for, and 2 cores less 1 for each of 2 devices leave 0",
        ),
    ],
)
def test_workers_are_told_with_the_reason(devices: int, requested: int | None, cores: int, words: str) -> None:
    assert loader_workers(devices, requested, cores).words == words


def test_threads_of_all_ranks_fit_the_cores_and_every_rank_has_one() -> None:
    for cores in range(1, 20):
        for ranks in range(1, 20):
            threads = threads_per_rank(ranks, cores)
            assert threads == 1 or threads * ranks <= cores
            assert (threads + 1) * ranks > cores


def put(root: Path, **files: str) -> Path:
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
    cores = core_limits(put(tmp_path, **files), affinity=16)
    assert cores.count == count
    assert ("quota" in cores.words) == (count < 16)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_affinity_limits_the_cores() -> None:
    program = (
        "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]);"
        "from duoka.scaling import available_cores; print(available_cores())"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout.strip() == "1"


def test_scaling_needs_nothing_but_the_standard_library() -> None:
    program = "import sys, duoka.scaling; print(*{'torch', 'numpy'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout.strip() == ""


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: Batch(0), "batch size is 0"),
        (lambda: Batch(2.5), "batch size is 2.5"),
        (lambda: Batch(True), "batch size is True"),
        (lambda: Batch(8, 0), "devices is 0"),
        (lambda: Batch(8, accumulate=-1), "accumulate is -1"),
        (lambda: Batch(8, mode="per-device"), "'per_device'?"),
        (lambda: Batch(5, 3, "global", 2), "at least 6"),
        (lambda: LearningRate(0), "lr is 0; it must be greater than 0"),
        (lambda: LearningRate(math.nan), "lr is nan"),
        (lambda: LearningRate("0.1"), "lr is '0.1'"),
        (lambda: LearningRate(0.1, 2, "liner"), "'linear'?"),
        (lambda: LearningRate(0.1, warmup_epochs=-1), "warmup_epochs is -1"),
        (lambda: LearningRate(0.1, warmup_epochs=1, warmup_steps=5), "exclude each other"),
        (lambda: loader_workers(0), "devices is 0"),
        (lambda: loader_workers(1, -2), "workers is -2"),
        (lambda: loader_workers(1, 2, 0), "cores is 0"),
        (lambda: threads_per_rank(0), "ranks is 0"),
    ],
)
def test_a_bad_value_is_an_error_with_the_value_and_the_remedy(build: object, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        build()  # type: ignore[operator]
    assert said in str(raised.value)


def test_the_machine_has_a_core() -> None:
    assert 1 <= scaling.available_cores() <= (os.cpu_count() or 1)
