"""Training checkpoints: values come back with their types, to the last bit."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter, OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import duoka.checkpoint as checkpoint
from duoka.errors import CheckpointError, ConfigError


def same(first: Any, second: Any) -> bool:
    """Equal in value, type and order, all the way down."""
    if type(first) is not type(second):
        return False
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return list(first) == list(second) and all(
            type(a) is type(b) and same(first[a], second[b]) for a, b in zip(first, second, strict=True)
        )
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return repr(first) == repr(second)


def round_trip(state: dict[str, Any], folder) -> dict[str, Any]:
    checkpoint.save_training(folder / "t.pt", state)
    return checkpoint.load_training(folder / "t.pt")


def test_every_type_comes_back_as_it_was(tmp_path):
    state = {
        "ints": {0: 1, 1: 2.0, -1: 2**70, (1, "a"): True, None: False, 1.5: 1},
        "floats": [1.0, 0.1, float("inf"), -0.0, 5e-324, float("nan")],
        "tuple": (1, (2, [3, ()]), None),
        "ordered": OrderedDict(b=1, a=2),
        "counter": Counter({30: 1, 60: 2}),
        "text": ["多卡", "", b"bytes", "\ud800"[:0]],
        "complex": 1 + 2j,
        "set": {1, 2},
        "torch": [torch.float16, torch.device("cpu"), torch.Size([1, 2])],
        "long": "x" * 100_000,
        "many": list(range(3000)),
    }
    assert same(round_trip(state, tmp_path), state)


def test_numpy_becomes_torch_and_python(tmp_path):
    state = {"array": np.arange(6.0).reshape(2, 3)[:, ::-1], "scalar": np.float32(0.5), "flag": np.bool_(True)}
    loaded = round_trip(state, tmp_path)
    assert torch.equal(loaded["array"], torch.tensor([[2.0, 1, 0], [5, 4, 3]], dtype=torch.float64))
    assert same(loaded["scalar"], 0.5)
    assert same(loaded["flag"], True)


def parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(2))]


def step(optimizer: torch.optim.Optimizer) -> None:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = sum((p**2).sum() for group in optimizer.param_groups for p in group["params"])
        loss.backward()
        return loss

    optimizer.step(closure)


OPTIMIZERS = [
    *(
        getattr(torch.optim, name)
        for name in ["ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "LBFGS", "NAdam", "RAdam", "RMSprop"]
    ),
    torch.optim.Rprop,
    lambda p: torch.optim.SGD(p, momentum=0.9, nesterov=True, lr=0.1),
    lambda p: torch.optim.SGD([{"params": p[:1], "lr": 0.5}, {"params": p[1:]}], lr=torch.tensor(0.1)),
]


@pytest.mark.parametrize("build", OPTIMIZERS, ids=lambda build: getattr(build, "__name__", "SGD"))
def test_the_state_of_every_optimizer_is_the_same_afterwards(build, tmp_path):
    optimizer = build(parameters())
    step(optimizer)
    state = optimizer.state_dict()
    assert same(round_trip({"optimizer": state}, tmp_path)["optimizer"], state)


schedulers = torch.optim.lr_scheduler
SCHEDULERS = {
    "step": lambda o: schedulers.StepLR(o, 2),
    "multi": lambda o: schedulers.MultiStepLR(o, [3, 6]),
    "lambda": lambda o: schedulers.LambdaLR(o, lambda epoch: 0.9**epoch),
    "exponential": lambda o: schedulers.ExponentialLR(o, 0.9),
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, 10),
    "warm restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3),
    "one cycle": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=20),
    "cyclic": lambda o: schedulers.CyclicLR(o, 0.01, 0.1),
    "linear": lambda o: schedulers.LinearLR(o),
    "polynomial": lambda o: schedulers.PolynomialLR(o),
    "sequence": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o), schedulers.CosineAnnealingLR(o, 9)], milestones=[4]
    ),
    "plateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=1),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_schedule_goes_on_where_it_stopped(name, tmp_path):
    def run(steps: int, path=None, resume=None) -> list[float]:
        optimizer = torch.optim.SGD(parameters(), lr=0.05, momentum=0.9)
        schedule = SCHEDULERS[name](optimizer)
        if resume:
            state = checkpoint.load_training(resume)
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
        rates = []
        for _ in range(steps):
            step(optimizer)
            schedule.step(1.0) if name == "plateau" else schedule.step()
            rates.append(optimizer.param_groups[0]["lr"])
        if path:
            checkpoint.save_training(path, {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()})
        return rates

    whole = run(9)
    first = run(5, path=tmp_path / "t.pt")
    assert first + run(4, resume=tmp_path / "t.pt") == whole


def test_the_gradient_scaler_is_the_same_afterwards(tmp_path):
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(1))
    state = scaler.state_dict()
    assert state
    assert same(round_trip({"scaler": state}, tmp_path)["scaler"], state)


def draw() -> list[Any]:
    old = [np.random.rand(), np.random.randn()]
    return [random.random(), random.gauss(0, 1), *old, torch.rand(3), torch.randn(1)]


def test_every_generator_continues_exactly_where_it_was(tmp_path):
    draw()  # leaves half a pair of normal draws behind in Python's and NumPy's generators
    before = checkpoint.rng_state()
    expected = draw()
    state = round_trip({"rng": before}, tmp_path)["rng"]
    assert same(state, before)
    checkpoint.set_rng_state(state)
    assert same(draw(), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator here")
def test_the_accelerators_generator_continues_exactly(tmp_path):
    device = torch.accelerator.current_accelerator()
    before = round_trip({"rng": checkpoint.rng_state()}, tmp_path)["rng"]
    expected = torch.rand(5, device=device)
    checkpoint.set_rng_state(before)
    assert torch.equal(torch.rand(5, device=device), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator here")
def test_what_an_accelerator_wrote_loads_without_one(tmp_path):
    device = torch.accelerator.current_accelerator()
    model = nn.Linear(3, 2).to(device)
    for name in ("m.pt", "m.safetensors"):
        checkpoint.save(model, tmp_path / name)
        assert all(value.device.type == "cpu" for value in checkpoint.load(tmp_path / name).values())
        assert checkpoint.load(tmp_path / name, map_location=device)["weight"].device.type == device.type
        assert torch.equal(checkpoint.load(tmp_path / name, into=nn.Linear(3, 2).to(device)).weight, model.weight)
    assert torch.load(tmp_path / "m.pt", weights_only=True)["weight"].device.type == "cpu"


def network(compiled: bool = False, parallel: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    if compiled:
        model[0] = torch.compile(model[0])
    return nn.DataParallel(model) if parallel else model


def trained(model: nn.Module, steps: int, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    for _ in range(steps):
        step(optimizer)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_optimizer_state_by_names_fits_any_wrapper_and_order(tmp_path):
    model = network(compiled=True, parallel=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    trained(model, 3, optimizer)
    state = {"model": model, "optimizer": checkpoint.optimizer_state(optimizer, model)}
    checkpoint.save_training(tmp_path / "t.pt", state)
    expected = trained(model, 3, optimizer)
    assert list(state["optimizer"]["state"]) == ["0.weight", "0.bias", "1.weight", "1.bias"]

    other = network()
    backwards = torch.optim.AdamW(list(other.parameters())[::-1], lr=0.3)
    saved = checkpoint.load_training(tmp_path / "t.pt")
    checkpoint.load_state(other, saved["model"])
    checkpoint.load_optimizer_state(backwards, other, saved["optimizer"])
    assert torch.equal(trained(other, 3, backwards), expected)


def test_an_optimizer_of_other_parameters_is_named_and_stays_as_it_was():
    optimizer = torch.optim.AdamW(network().parameters())
    model = network()
    state = checkpoint.optimizer_state(torch.optim.AdamW(model.parameters()), model)
    other = nn.ModuleDict({"head": nn.Linear(2, 2)})
    optimizer = torch.optim.AdamW(other.parameters(), lr=0.7)
    with pytest.raises(CheckpointError, match=r"without \['head.bias', 'head.weight'\], with \['0.bias'"):
        checkpoint.load_optimizer_state(optimizer, other, state)
    assert optimizer.param_groups[0]["lr"] == 0.7
    grouped = torch.optim.AdamW([{"params": [p]} for p in model.parameters()])
    with pytest.raises(CheckpointError, match="1 parameter groups, this one 4"):
        checkpoint.load_optimizer_state(grouped, model, state)


def test_a_parameter_that_is_not_the_models_goes_by_its_number():
    model, own = network(), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([*model.parameters(), own], momentum=0.9)
    step(optimizer)
    state = checkpoint.optimizer_state(optimizer, model)
    assert list(state["state"])[-1] == "#4"
    checkpoint.load_optimizer_state(optimizer, model, state)


def test_a_newer_version_and_a_file_of_weights_are_told_apart(tmp_path):
    torch.save({"format": "duoka.training", "version": 99, "state": {}}, tmp_path / "newer.pt")
    with pytest.raises(CheckpointError, match=r"version 99, this duoka reads up to version 1: install a newer"):
        checkpoint.load_training(tmp_path / "newer.pt")
    checkpoint.save(nn.Linear(1, 1), tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"no training checkpoint .* duoka\.load"):
        checkpoint.load_training(tmp_path / "weights.pt")
    with pytest.raises(ConfigError, match=r"\.pt or \.pth"):
        checkpoint.save_training(tmp_path / "t.safetensors", {})


def test_the_model_in_a_training_checkpoint_loads_by_itself(tmp_path):
    model = network()
    checkpoint.save_training(
        tmp_path / "t.pt", {"epoch": 3, "model": nn.DataParallel(model), "optimizer": {"state": {}}}
    )
    assert torch.equal(
        checkpoint.load(tmp_path / "t.pt", into=network(parallel=True)).module[0].weight, model[0].weight
    )


def test_what_cannot_be_saved_is_found_by_its_place(tmp_path):
    with pytest.raises(CheckpointError, match=r"state\['state'\]\['schedule'\]\[1\] is of type builtins\.function"):
        checkpoint.save_training(tmp_path / "t.pt", {"schedule": [1, lambda: None]})
    assert list(tmp_path.iterdir()) == []


def test_importing_it_starts_no_compiler_and_no_process():
    watched = ("torch._dynamo", "triton", "duoka.workers")
    program = f"import sys, duoka.checkpoint; print([n for n in {watched} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_state_of_an_unused_accelerator_is_not_read(monkeypatch):
    class Cuda:
        used = False

        @classmethod
        def is_initialized(cls) -> bool:
            return cls.used

        @classmethod
        def get_rng_state(cls) -> torch.Tensor:
            assert cls.used, "this would initialise CUDA"
            return torch.zeros(2)

    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setattr(torch, "get_device_module", lambda _: Cuda)
    assert checkpoint.rng_state()["accelerator"] is None
    Cuda.used = True
    assert checkpoint.rng_state()["accelerator"]["type"] == "cuda"


def test_the_state_of_another_optimizer_class_is_refused():
    model = nn.Linear(2, 2)
    saved = checkpoint.optimizer_state(torch.optim.AdamW(model.parameters()), model)
    with pytest.raises(CheckpointError, match=r"another optimizer than SGD: its group 0 has no .*momentum"):
        checkpoint.load_optimizer_state(torch.optim.SGD(model.parameters()), model, saved)
