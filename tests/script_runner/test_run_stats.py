"""The stats of a run says what was measured, and no more."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from duoka.data_parallel.timers import Clock
from duoka.script_runner.report import advice, lines
from duoka.script_runner.run_stats import RunStats, StepTiming

CPUS = [torch.device("cpu")] * 2


def account_of(seconds: list[tuple[float, bool]], batch: int = 32) -> RunStats:
    """The stats of a run with steps of these times, computed in parts or whole."""
    stats = RunStats(CPUS, Clock())
    model = stats.model(nn.Linear(2, 2))
    model.found("Linear", "trained by SGD at line 1")
    for one, is_split in seconds:
        model.count(batch, split=is_split)
        stats.steps.append(StepTiming(one, 0.0, 0.0, 0.0, is_split))
    stats.calls.steps = len(seconds) + 1
    return stats


def said(stats: RunStats) -> str:
    return " ".join(lines(stats))


def test_a_speed_up_is_of_neighbouring_steps_and_not_of_the_first() -> None:
    first = [(9.0, False)] * 3 + [(9.0, True)]
    steps = first + [(0.1, True)] * 10 + [(0.15, False)] * 3 + [(0.1, True)] * 10 + [(7.0, True)] * 40
    assert "a step: 150.0 ms on one device (tried in between), 100.0 ms on all: 1.50 times as fast" in said(
        account_of(steps)
    )


def test_a_loss_of_speed_is_said_and_what_to_do_about_it() -> None:
    stats = account_of([(0.1, True)] * 10 + [(0.05, False)] * 3 + [(0.1, True)] * 10)
    assert "2.00 times slower" in said(stats)
    assert "best run without duoka" in advice(stats)


def test_more_than_n_times_as_fast_on_n_devices_is_not_believed() -> None:
    stats = account_of([(0.1, True)] * 10 + [(0.5, False)] * 3 + [(0.1, True)] * 10)
    assert "no comparison" in said(stats)
    assert "times as fast on" not in said(stats).replace("more than 2 times as fast", "")


@pytest.mark.parametrize("steps", [[(9.0, False)] * 3 + [(0.1, True)] * 9, [(0.1, True)] * 9])
def test_without_steps_in_between_nothing_is_compared(steps) -> None:
    assert "too few steps to compare" in said(account_of(steps))
    assert "times" not in said(account_of(steps)).replace("its time", "")


def test_too_few_steps_tell_nothing() -> None:
    assert "nothing that can be told from 2 training steps" in advice(account_of([(0.1, True)]))


def test_batches_of_one_sample_are_named_although_an_evaluation_was_shared() -> None:
    stats = account_of([(0.1, False)] * 9, batch=1)
    with torch.no_grad():
        stats.models[0].count(32, split=True)
    assert "one sample cannot be shared" in advice(stats)
    assert stats.models[0].batch == 1
    assert not stats.models[0].is_shared


def test_scale_batch_is_advised_only_where_it_can_do_something() -> None:
    stats = account_of([(0.1, True)] * 10 + [(0.05, False)] * 3 + [(0.1, True)] * 10)
    assert "--scale-batch" not in advice(stats)
    stats.scales = True
    assert "--scale-batch has changed nothing" in said(stats)


def test_models_that_one_line_has_made_are_said_once() -> None:
    stats = RunStats(CPUS, Clock())
    for _ in range(3):
        model = stats.model(nn.Linear(2, 2))
        model.found("Linear", "trained by SGD at line 7")
        model.refuse("it looks across samples")
    assert lines(stats)[0] == "Linear (3 of them): on one device, because it looks across samples."
    assert said(stats).count("Linear") == 1
