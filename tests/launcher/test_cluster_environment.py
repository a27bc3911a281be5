"""Launches inside a cluster job: torchrun's and Slurm's processes run as their own ranks."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import duoka
from duoka.devices import DeviceSelection
from duoka.launcher import cluster_environment

JOB_SCRIPT = """
    import os
    import duoka, psutil, torch

    def work(scale):
        world = duoka.current_world()
        return scale * world.all_reduce(torch.tensor([world.rank + 1.0])).item(), world.local_rank, world.size

    values = duoka.launch(work, 10, devices="cpu", returns="all")
    first = duoka.launch(work, 1, devices="cpu")
    open(f"out{os.environ.get('RANK', os.environ.get('SLURM_PROCID'))}", "w").write(
        f"{values} {first} {len(psutil.Process().children())}"
    )
"""


def test_under_torchrun_each_process_is_its_own_rank(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(textwrap.dedent(JOB_SCRIPT))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*torchrun, "job.py"], cwd=tmp_path, check=True, capture_output=True)
    expected = "[(30.0, 0, 2), (30.0, 1, 2)] (3.0, 0, 2) 0"
    assert [(tmp_path / f"out{rank}").read_text() for rank in range(2)] == [expected] * 2


def test_slurm_tasks_form_one_group_from_slurms_variables(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(textwrap.dedent(JOB_SCRIPT))
    slurm = {
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_JOB_ID": "731",
        "SLURM_JOB_NODELIST": "localhost",
    }
    tasks = [
        subprocess.Popen(
            [sys.executable, "job.py"],
            cwd=tmp_path,
            env={**os.environ, **slurm, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
        )
        for rank in range(2)
    ]
    assert [task.wait() for task in tasks] == [0, 0]
    assert (tmp_path / "out1").read_text() == "[(30.0, 0, 2), (30.0, 1, 2)] (3.0, 0, 2) 0"


def test_a_slurm_batch_script_without_srun_runs_alone() -> None:
    code = "import duoka; print(duoka.launch(lambda: duoka.current_world().size, devices='cpu'))"
    slurm = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "1", "SLURM_LOCALID": "0"}
    environment = {**os.environ, **slurm}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


def test_in_a_job_an_invalid_device_is_an_error_too(monkeypatch) -> None:
    set_torchrun_variables(monkeypatch)
    with pytest.raises(duoka.errors.DeviceError, match="nonsense"):
        duoka.launch(lambda: 0, devices="nonsense")


def test_in_a_job_each_process_uses_the_device_of_its_local_rank(monkeypatch) -> None:
    cards = [torch.device("cuda", index) for index in range(4)]
    asked = {"2,3": cards[2:], "cuda:3,0": [cards[3], cards[0]], "auto": cards, "all": cards, "cuda:1": cards[1:2]}
    monkeypatch.setattr(cluster_environment, "resolve", lambda spec: DeviceSelection(tuple(asked[spec]), ""))
    for spec in ("2,3", "cuda:3,0", "auto", "all"):
        assert [cluster_environment._device(spec, rank, 2) for rank in range(2)] == asked[spec][:2]
    assert cluster_environment._device("cuda:1", 0, 1) == cards[1]
    for spec, size, message in (
        ("2,3", 4, "2 devices.*4 processes.*nproc-per-node 2"),
        ("cuda:1", 2, "1 device,.*2 processes"),
        ("cpu:3", 2, "3 devices.*2 processes"),
        ("idle:2", 2, "'idle:2' is ambiguous"),
        ("idle", 2, "'idle' is ambiguous"),
    ):
        with pytest.raises(duoka.errors.LaunchError, match=message):
            cluster_environment._device(spec, 0, size)
    with pytest.raises(duoka.errors.LaunchError, match="Start at most 4"):
        cluster_environment._device("all", 4, 5)


def test_a_job_of_one_process_starts_workers_for_several_devices(monkeypatch) -> None:
    set_torchrun_variables(monkeypatch)
    assert duoka.launch(lambda: duoka.current_world().size, devices="cpu:2") == 2


def set_torchrun_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
