"""Processes that a script starts see the emulated GPUs, or the script gets a clear error, and its copies end with it."""

from __future__ import annotations

import psutil
import pytest

from support.run_script import run_duoka

pytestmark = pytest.mark.timeout(300)

SPAWNS = """
import sys
import torch
import torch.multiprocessing as mp

def work(rank, results):
    torch.cuda.set_device(rank)
    results[rank] = torch.ones(2, device=f"cuda:{rank}").sum() + torch.cuda.device_count() + torch.cuda.current_device()

if __name__ == "__main__":
    results = torch.zeros(2).share_memory_()
    for method in ("spawn", "fork"):
        mp.start_processes(work, (results,), nprocs=torch.cuda.device_count(), start_method=method)
        print(results.tolist())
"""


def test_processes_of_multiprocessing_see_the_emulated_gpus(tmp_path) -> None:
    ended = run_duoka(tmp_path, SPAWNS)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == ["[4.0, 5.0]"] * 2


DISTRIBUTED = """
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

def work(rank, count):
    dist.init_process_group("nccl", init_method="tcp://127.0.0.1:29411", rank=rank, world_size=count)

if __name__ == "__main__":
    mp.spawn(work, (torch.cuda.device_count(),), nprocs=torch.cuda.device_count())
"""


def test_a_process_group_of_gpus_is_refused_with_the_remedy(tmp_path) -> None:
    ended = run_duoka(tmp_path, DISTRIBUTED)
    assert ended.returncode == 1
    assert "start the script with torchrun, without duoka run" in ended.stderr


LAUNCHES = """
import os, subprocess, sys, time
import torch
if "LOCAL_RANK" in os.environ:
    print("copy", flush=True)
    time.sleep(600)
process = subprocess.Popen([sys.executable, os.path.abspath(sys.argv[0])], env={**os.environ, "LOCAL_RANK": "1"},
                           stdout=subprocess.PIPE)
process.stdout.readline()
other = subprocess.Popen(["sleep", "60"])
print(process.pid, other.pid, flush=True)
torch.distributed.init_process_group("nccl", rank=0, world_size=2)
"""


def test_only_copies_of_a_script_end_when_it_fails(tmp_path) -> None:
    ended = run_duoka(tmp_path, LAUNCHES)
    assert ended.returncode == 1
    assert "the script creates a process group of GPUs" in ended.stderr
    copy, other = map(int, ended.stdout.split())
    assert not psutil.pid_exists(copy)
    psutil.Process(other).kill()


RUNS_PYTHON = """
import subprocess, sys, torch
subprocess.run([sys.executable, "-c", "import torch; print(torch.cuda.is_available())"], check=True)
torch.nn.Linear(2, 2).cuda()(torch.ones(4, 2))
"""


def test_the_report_names_the_line_that_starts_python(tmp_path) -> None:
    ended = run_duoka(tmp_path, RUNS_PYTHON)
    assert ended.returncode == 0, ended.stderr
    assert "The process that the script starts at line 3 of t.py runs without duoka" in ended.stderr
