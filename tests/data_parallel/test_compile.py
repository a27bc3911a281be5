"""``torch.compile`` on every device, while the wrapped model stays what it is."""

from __future__ import annotations

import contextlib
import copy
import importlib
import os
from pathlib import Path

import pytest
import torch
from torch import nn

import duoka
from support.comparison import relative_distance


@pytest.fixture(autouse=True)
def no_tqdm_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop torch's compiler, which shows progress with tqdm, from starting tqdm's monitor thread."""
    with contextlib.suppress(ImportError):
        monkeypatch.setattr(importlib.import_module("tqdm").tqdm, "monitor_interval", 0)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_takes_the_same_steps(backend: str, wrap) -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.GroupNorm(2, 8), nn.Tanh(), nn.Linear(8, 3))
    reference = copy.deepcopy(module)
    model = wrap(module, compile={"backend": backend})
    assert list(model.state_dict()) == list(reference.state_dict())
    assert next(iter(model.parameters())) is module[0].weight
    assert model.module is module
    runs = [(m, torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9)) for m in (model, reference)]
    for _ in range(4):
        x = torch.randn(6, 4)
        for m, optimizer in runs:
            optimizer.zero_grad()
            m(x).pow(2).mean().backward()
            optimizer.step()
    assert relative_distance(module, reference) < 1e-5
    assert list(model.state_dict()) == list(reference.state_dict())
    assert len(list(model.modules())) == len(list(module.modules())) + 1


class Counting:
    """A backend that writes the ID of each process that compiles to a file."""

    def __init__(self, file: Path) -> None:
        self.file = str(file)

    def __call__(self, graph, _):
        with open(self.file, "a") as file:
            file.write(f"{os.getpid()}\n")
        return graph.forward


def test_every_device_compiles_once(wrap, tmp_path: Path) -> None:
    model = wrap(net(), compile={"backend": Counting(tmp_path / "compiled")})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(6, 4)).pow(2).mean().backward()
        optimizer.step()
    pids = (tmp_path / "compiled").read_text().split()
    assert len(pids) == len(set(pids)) == 2


def test_one_device_compiles_too_and_copies_keep_the_option(tmp_path: Path) -> None:
    model = copy.deepcopy(
        duoka.DataParallel(net(), devices="cpu", compile={"backend": Counting(tmp_path / "compiled")})
    )
    model(torch.randn(6, 4))
    assert (tmp_path / "compiled").read_text().split() == [str(os.getpid())]
    assert next(iter(model.state_dict())) == "0.weight"
