"""Saving on rank 0 with real ranks over gloo: other ranks wait for the outcome; rank 0 may save alone."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

PRELUDE = """
import json, os, sys, time, torch, torch.distributed as dist
import duoka.checkpoint as checkpoint
from duoka.checkpoint import rank_zero_write
dist.init_process_group("gloo")
rank = dist.get_rank()
outcome = {}
def attempt(*arguments):
    try:
        checkpoint.save(*arguments)
        return "saved"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
"""
FINALE = """
dist.barrier()
print(json.dumps(outcome))
dist.destroy_process_group()
"""


def ranks(program: str, folder: Path, size: int = 2) -> list[dict]:
    """Run ``program`` on ``size`` ranks; return what each put into ``outcome``."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    command = [sys.executable, "-c", PRELUDE + program + FINALE]
    started = [
        subprocess.Popen(command, cwd=folder, env=common | {"RANK": str(rank)}, stdout=-1, stderr=-1, text=True)
        for rank in range(size)
    ]
    try:
        ended = [process.communicate(timeout=100) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert [process.returncode for process in started] == [0] * size, "\n".join(said for _, said in ended)
    return [json.loads(out.splitlines()[-1]) for out, _ in ended]


def test_all_ranks_return_after_rank_0_has_written(tmp_path):
    program = """
for number in range(3):
    time.sleep(0.3 if rank == 0 else 0)
    attempt({"w": torch.full((3,), float(number + 10 * rank))}, "m.pt")
    outcome[number] = checkpoint.load("m.pt")["w"][0].item()
    dist.barrier()
"""
    assert ranks(program, tmp_path, size=3) == [{"0": 0.0, "1": 1.0, "2": 2.0}] * 3


def test_rank_0_alone_may_save_and_all_may_save_afterwards(tmp_path):
    program = """
if rank == 0:
    outcome["alone"] = attempt({"w": torch.zeros(1)}, "alone.pt")
outcome["together"] = attempt({"w": torch.full((1,), float(rank))}, "together.safetensors")
outcome["value"] = checkpoint.load("together.safetensors")["w"].item()
"""
    rank_0, *others = ranks(program, tmp_path)
    assert rank_0["alone"] == "saved"
    assert [rank["together"] for rank in (rank_0, *others)] == ["saved"] * 2
    assert [rank["value"] for rank in others] == [0.0]


def test_an_error_of_rank_0_is_raised_on_every_rank(tmp_path):
    (tmp_path / "folder.pt").mkdir()
    program = """
outcome["storage"] = attempt({"w": torch.zeros(1)}, "folder.pt")
outcome["state"] = attempt({"w": print if rank == 0 else torch.zeros(1)}, "m.pt")
outcome["after"] = attempt({"w": torch.zeros(1)}, "m.pt")
"""
    first, *others = ranks(program, tmp_path)
    assert first["storage"].startswith("StorageError: cannot write")
    assert first["state"].startswith("CheckpointError: state['w'] is of type")
    assert first["after"] == "saved"
    assert others == [first]


def test_a_rank_that_waits_for_a_save_that_never_begins_says_so(tmp_path):
    program = """
rank_zero_write.START_TIMEOUT_S = 0.5
if rank == 1:
    outcome["said"] = attempt({"w": torch.zeros(1)}, "only_rank_1.pt")
"""
    said = ranks(program, tmp_path)[1]["said"]
    assert said.startswith("CheckpointError: rank 1 has waited")
    assert "on every rank or on rank 0 alone" in said
    assert list(tmp_path.iterdir()) == []


def test_ranks_do_not_wait_for_one_another_inside_rank_0s_save(tmp_path):
    program = """
if rank == 0:
    outcome["first"] = attempt({"w": torch.zeros(1)}, "m.pt")  # returns although no other rank has come
    open("rank 0 is through", "w").close()
else:
    while not os.path.exists("rank 0 is through"):
        time.sleep(0.01)
    outcome["first"] = attempt({"w": torch.zeros(1)}, "m.pt")
"""
    assert ranks(program, tmp_path) == [{"first": "saved"}] * 2


@pytest.mark.parametrize("size", [1])
def test_a_group_of_one_just_writes(size, tmp_path):
    assert ranks("outcome['it'] = attempt({'w': torch.zeros(1)}, 'm.pt')", tmp_path, size) == [{"it": "saved"}]
