"""A warm worker keeps nothing of the models that it served, and stays warm when a model is deleted."""

from __future__ import annotations

import gc

import psutil
import pytest
import torch
from torch import nn

import duoka
from support.processes import worker_pids
from support.waiting import wait_until


def worker_state() -> tuple[list[int], int]:
    """Return the workers, and how many descriptors they have open."""
    pids = worker_pids()
    return pids, sum(psutil.Process(pid).num_fds() for pid in pids)


@pytest.mark.parametrize("ending", ["close", "del", "failed backward"])
def test_a_worker_serves_many_models_without_growth(ending: str) -> None:
    duoka.close_workers()
    seen = []
    for _ in range(8):
        model = duoka.DataParallel(nn.Linear(64, 256), devices="cpu:2", check="off")
        loss = model(torch.ones(200, 64)).sum()
        if ending == "failed backward":
            loss.register_hook(lambda _: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                loss.backward()
        else:
            loss.backward()
        if ending == "close":
            model.close()
        del model, loss
        gc.collect()
        wait_until(lambda: not pool_workers_in_use())
        seen.append(worker_state())
    assert seen[1:] == [seen[1]] * 7


def pool_workers_in_use() -> int:
    from duoka.workers import pool

    return len(pool._pool._acquired)


def test_a_worker_frees_the_memory_of_each_model() -> None:
    """Each model has 8 MB of parameters and 16 MB of outputs; the allocator keeps that of a few."""
    resident = []
    for _ in range(12):
        model = duoka.DataParallel(nn.Linear(512, 4096, bias=False), devices="cpu:2", check="off")
        model(torch.ones(2048, 512)).sum().backward()
        model.close()
        resident.append(sum(psutil.Process(pid).memory_full_info().uss for pid in worker_pids()))
    assert resident[-1] < resident[5] + (60 << 20)
