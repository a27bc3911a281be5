"""The report of a run states what was measured, and no more."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from duoka.data_parallel.call_context import Timers
from duoka.script_runner.report import report_lines, suggestion
from duoka.script_runner.run_stats import RunStats, StepTiming

CPUS = [torch.device("cpu")] * 2
SLOWED = [(0.1, True)] * 10 + [(0.05, False)] * 3 + [(0.1, True)] * 10
"""Seconds of steps, and whether they were split: faster on one device."""


def stats_of(seconds: list[tuple[float, bool]], batch: int = 32) -> RunStats:
    """Statistics of a run with steps of these times, split or whole."""
    stats = RunStats(CPUS, Timers())
    model = stats.model(nn.Linear(2, 2))
    model.found("Linear", "trained by SGD at line 1")
    for one, is_split in seconds:
        model.count(batch, split=is_split)
        stats.steps.append(StepTiming(one, 0.0, 0.0, 0.0, is_split))
    stats.num_steps = len(seconds) + 1
    return stats


def report(stats: RunStats) -> str:
    return " ".join(report_lines(stats))


def test_speed_up_is_of_neighboring_steps_and_not_of_the_first() -> None:
    first = [(9.0, False)] * 3 + [(9.0, True)]
    steps = first + [(0.1, True)] * 10 + [(0.15, False)] * 3 + [(0.1, True)] * 10 + [(7.0, True)] * 40
    text = report(stats_of(steps))
    assert "150 ms on one device" in text
    assert "100 ms on all devices: 1.50 times as fast" in text


def test_slowdown_is_reported_with_a_suggestion() -> None:
    stats = stats_of(SLOWED)
    assert "2.00 times slower" in report(stats)
    assert "without duoka" in suggestion(stats)


def test_more_than_n_times_as_fast_on_n_devices_is_no_comparison() -> None:
    stats = stats_of([(0.1, True)] * 10 + [(0.5, False)] * 3 + [(0.1, True)] * 10)
    assert "no comparison" in report(stats)
    assert "times as fast" not in report(stats)


@pytest.mark.parametrize("steps", [[(9.0, False)] * 3 + [(0.1, True)] * 9, [(0.1, True)] * 9])
def test_without_later_steps_on_one_device_nothing_is_compared(steps) -> None:
    text = report(stats_of(steps))
    assert "too few steps" in text
    assert "times" not in text


def test_too_few_steps_give_no_suggestion() -> None:
    assert "2 training steps" in suggestion(stats_of([(0.1, True)]))


def test_training_with_one_sample_is_named_although_evaluation_was_split() -> None:
    stats = stats_of([(0.1, False)] * 9, batch=1)
    with torch.no_grad():
        stats.models[0].count(32, split=True)
    assert "one sample cannot be split" in suggestion(stats)
    assert stats.models[0].batch == 1
    assert not stats.models[0].is_parallel


def test_scale_batch_is_suggested_only_if_it_has_an_effect() -> None:
    stats = stats_of(SLOWED)
    assert "--scale-batch" not in suggestion(stats)
    stats.scale_batch = True
    assert "--scale-batch had no effect" in report(stats)


def test_models_that_one_line_creates_are_reported_once() -> None:
    stats = RunStats(CPUS, Timers())
    for _ in range(3):
        model = stats.model(nn.Linear(2, 2))
        model.found("Linear", "trained by SGD at line 7")
        model.refuse("its output is random")
    assert report_lines(stats)[0] == "Linear (3 models) ran on one device: its output is random."
    assert report(stats).count("Linear") == 1


def test_several_calls_on_one_device_are_not_called_the_only_one() -> None:
    stats = stats_of([(0.1, False)])
    assert "was the only one" in suggestion(stats)
    stats.models[0].count(32, split=False)
    assert "none of the 2 calls of Linear" in suggestion(stats)
