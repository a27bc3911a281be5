"""Twenty runs of ``make soak``: whatever happens to a run, its end has the bits of an undisturbed one."""

from __future__ import annotations

import pytest

from faults.soak import NUM_STEPS, damage, run_all, schedule

TRIALS = sorted(schedule(20, seed=1), key=lambda trial: (trial.way, trial.device))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", range(4))
def test_a_run_with_a_fault_ends_with_the_bits_of_one_without(part: int, tmp_path) -> None:
    for trial, _, wrong in run_all(TRIALS[5 * part : 5 * part + 5], tmp_path):
        assert not wrong, f"{trial}: {wrong}"


def test_the_schedule_has_each_kind_of_fault_equally_often() -> None:
    trials = schedule(200, seed=0)
    assert trials == schedule(200, seed=0) != schedule(200, seed=1)
    kinds = [(trial.way, trial.device, trial.fault) for trial in trials]
    assert max(map(kinds.count, kinds)) - min(map(kinds.count, kinds)) <= 1
    assert all(1 <= trial.step < NUM_STEPS for trial in trials)


def test_damage_changes_a_checkpoint(tmp_path) -> None:
    last = tmp_path / "run" / "checkpoint" / "last.pt"
    damage(tmp_path)
    last.parent.mkdir(parents=True)
    last.write_bytes(bytes(1000))
    damage(tmp_path)
    assert last.read_bytes() != bytes(1000)
    assert len(last.read_bytes()) == 1000
