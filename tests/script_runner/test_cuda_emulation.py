"""The emulated GPUs replace names that exist in torch, and only while a script runs."""

from __future__ import annotations

import threading

import pytest
import torch

from duoka.script_runner import fake_cuda
from duoka.script_runner.cuda_emulation import emulate_cuda, emulated_api
from support.run_script import run_duoka

NAMES = [(owner, name) for _, owner, table in emulated_api(2) for name in table]


@pytest.mark.parametrize(("owner", "name"), NAMES, ids=[f"{owner.__name__}.{name}" for owner, name in NAMES])
def test_each_emulated_name_exists_in_torch(owner, name) -> None:
    assert hasattr(owner, name)


@pytest.mark.parametrize("package", ["cuda", "accelerator"])
def test_each_answer_replaces_a_function_of_the_package(package: str) -> None:
    answers = getattr(fake_cuda, f"{package}_answers")(fake_cuda.FakeDevices(2))
    replaced = {name for owner, name in NAMES if getattr(owner, "__name__", "").startswith(f"torch.{package}")}
    assert set(answers) <= replaced


def test_every_name_is_restored_after_the_run() -> None:
    before = [getattr(owner, name) for owner, name in NAMES]
    run = threading.Thread.run
    with emulate_cuda(2):
        assert torch.cuda.device_count() == 2
        assert torch.cuda.get_device_name(1) == "CPU worker 1 (duoka)"
        with pytest.raises(RuntimeError, match="invalid device ordinal 2"):
            torch.cuda.set_device(2)
    assert all(now is then for now, then in zip((getattr(*one) for one in NAMES), before, strict=True))
    assert threading.Thread.run is run


EVERY_NAME = """
import inspect, pkgutil, sys
import torch

x = torch.ones(4, 2)
arguments = {"devices": [0, 1], "tensor": x, "tensors": [x, x], "inputs": [[x, x], [x, x]], "device": 0, "peer_device": 1,
             "new_state": torch.get_rng_state(), "new_states": [torch.get_rng_state()], "seed": 1, "fraction": 0.5, "msg": "a",
             "range_id": 1, "stream": torch.cuda.Stream(), "enabled": False, "data_ptr": 0, "debug_mode": 0, "res": 0,
             "obj": x, "chunk_sizes": None}
number = 0
for package in (torch.cuda, torch.accelerator):
    names = [f"{package.__name__}.{one.name}" for one in pkgutil.iter_modules(package.__path__) if one.name[0] != "_"]
    for module in (package, *(sys.modules[name] for name in names if name in sys.modules)):
        for name in dir(module):
            value = getattr(module, name)
            is_torchs = str(getattr(value, "__module__", "")).startswith(("torch", "duoka"))
            if name[0] == "_" or not callable(value) or not is_torchs or isinstance(value, type) and "Storage" in name:
                continue
            try:
                needed = [p for p in inspect.signature(value).parameters.values()
                          if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
            except ValueError:
                needed = []
            number += 1
            try:
                answer = value(*(arguments.get(p.name, 1) for p in needed))
                if hasattr(answer, "__enter__"):
                    with answer:
                        pass
            except Exception as error:
                print(f"{module.__name__}.{name}|{type(error).__name__}|{error}".replace("\\n", " "))
print(number > 150)
"""
WITHOUT_GPU = ("nvidia", "not compiled", "driver", "dummy", "not supported on", "accelerator is")


def test_no_name_of_torch_cuda_or_accelerator_fails_for_want_of_a_gpu(tmp_path) -> None:
    ended = run_duoka(tmp_path, EVERY_NAME)
    *failures, last = ended.stdout.splitlines()
    assert last == "True", ended.stderr
    refused = {line.split("|")[0] for line in failures if "|UnsupportedError|" in line}
    others = [line for line in failures if line.split("|")[0] not in refused]  # the arguments here are made up
    assert not [line for line in others if any(word in line.lower() for word in WITHOUT_GPU)]
    assert "torch.cuda.CUDAGraph" in refused
    assert len(refused) < 40


SAVES_RANDOM_STATE = """
import torch
states = torch.cuda.random.get_rng_state_all()
first = torch.rand(2, device="cuda")
torch.cuda.random.set_rng_state_all(states)
print(torch.equal(first, torch.rand(2, device="cuda")), len(states), len(torch.cuda.default_generators))
with torch.cuda.device(1):
    print(torch.cuda.current_device(), torch.accelerator.current_device_index())
print(torch.cuda.current_device(), torch.cuda.memory.mem_get_info()[0] > 0, torch.cuda.memory_stats()["num_ooms"])
try:
    torch.cuda.MemPool()
except NotImplementedError as error:
    print(error)
"""


def test_submodules_answer_as_their_package(tmp_path) -> None:
    ended = run_duoka(tmp_path, SAVES_RANDOM_STATE)
    assert ended.returncode == 0, ended.stderr
    *answers, error = ended.stdout.splitlines()
    assert answers == ["True 2 2", "1 1", "0 True 0"]
    assert error.startswith("torch.cuda.MemPool needs a GPU, and in this run CPU workers take the place of GPUs")
