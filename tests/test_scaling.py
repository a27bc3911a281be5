"""Arithmetic of batch size and learning rate: laws that must hold, and its text."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from duoka.errors import ConfigError
from duoka.scaling import Batch, LearningRate


@pytest.mark.parametrize("mode", ["per_device", "global"])
def test_the_global_batch_grows_with_devices_and_accumulation(mode: str) -> None:
    for devices in range(1, 6):
        for accumulate in range(1, 4):
            batch = Batch(31, devices, mode, accumulate)
            assert batch.global_batch == (31 if mode == "global" else 31 * devices * accumulate)
            assert batch.global_batch == Batch(31, 1, mode, accumulate).global_batch * batch.growth


@pytest.mark.parametrize(
    ("batch", "summary"),
    [
        (Batch(256), "256 per device x 1 device = 256 global"),
        (Batch(256, 2), "256 per device x 2 devices = 512 global"),
        (Batch(64, 2, accumulation_steps=4), "64 per device x 2 devices x 4 accumulated = 512 global"),
        (Batch(256, 1, "global"), "256 global on 1 device"),
        (Batch(256, 2, "global"), "256 global = 128 per device x 2 devices"),
        (Batch(11, 3, "global"), "11 global = 4 + 4 + 3 on 3 devices"),
        (Batch(11, 3, "global", 2), "11 global = 1 to 2 per device x 3 devices x 2 accumulated"),
        (Batch(100, 16, "global"), "100 global = 6 to 7 per device x 16 devices"),
    ],
)
def test_the_batch_arithmetic_has_a_summary(batch: Batch, summary: str) -> None:
    assert batch.summary == summary


@pytest.mark.parametrize(
    ("lr", "scaled", "summary"),
    [
        (LearningRate(0.1), 0.1, "lr 0.1"),
        (LearningRate(0.1, 2), 0.1, "lr 0.1"),
        (LearningRate(0.1, 2, "linear", warmup_epochs=5), 0.2, "lr 0.1 -> 0.2 (linear), 5 warm-up epochs"),
        (LearningRate(0.1, 3, "linear", warmup_steps=1), 0.3, "lr 0.1 -> 0.3 (linear), 1 warm-up step"),
        (LearningRate(0.001, 4, "sqrt", warmup_epochs=1), 0.002, "lr 0.001 -> 0.002 (sqrt), 1 warm-up epoch"),
        (LearningRate(0.1, 1, "linear", warmup_epochs=0.5), 0.1, "lr 0.1, 0.5 warm-up epochs"),
    ],
)
def test_the_learning_rate_follows_the_rule_and_has_a_summary(lr: LearningRate, scaled: float, summary: str) -> None:
    assert lr.scaled == pytest.approx(scaled, rel=1e-12)
    assert lr.summary == summary


def test_scaling_imports_neither_torch_nor_numpy() -> None:
    program = "import sys, duoka.scaling; print(*{'torch', 'numpy'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == ""


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Batch(0), "batch_size=0"),
        (lambda: Batch(2.5), "batch_size=2.5"),
        (lambda: Batch(True), "batch_size=True"),
        (lambda: Batch(8, 0), "devices=0"),
        (lambda: Batch(8, accumulation_steps=-1), "gradient_accumulation_steps=-1"),
        (lambda: Batch(8, mode="per-device"), "'per_device'?"),
        (lambda: Batch(5, 3, "global", 2), "at least 6"),
        (lambda: LearningRate(0), "lr=0"),
        (lambda: LearningRate(math.nan), "lr=nan"),
        (lambda: LearningRate("0.1"), "lr='0.1'"),
        (lambda: LearningRate(0.1, 2, "liner"), "'linear'?"),
        (lambda: LearningRate(0.1, warmup_epochs=-1), "warmup_epochs=-1"),
        (lambda: LearningRate(0.1, warmup_epochs=1, warmup_steps=5), "warmup_steps=5"),
    ],
)
def test_a_bad_value_is_an_error_with_the_value_and_the_remedy(build: object, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        build()  # type: ignore[operator]
    assert message in str(raised.value)
