"""The contract: for a given batch, several devices take the step of one, for any model and any split."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from torch import nn

from support.comparison import relative_distance
from support.transports import both_transports

pytestmark = pytest.mark.usefixtures("float64")


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.GroupNorm(2, channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return torch.relu(x + self.second(torch.relu(self.norm(self.first(x)))))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(Residual(8), Residual(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(20, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.layers(self.tokens(x)).mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 12, num_layers=2, batch_first=True)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        out, (hidden, _) = self.lstm(x)
        return self.head(out.mean(1) + hidden[-1])


def images(batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, 6, 6)


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 5)), lambda n: torch.randn(n, 10)),
    "resnet": (ResNet, images),
    "transformer": (Transformer, lambda n: torch.randint(20, (n, 7))),
    "lstm": (Recurrent, lambda n: torch.randn(n, 4, 6)),
}


@both_transports
@pytest.mark.parametrize("devices", ["cpu:2", "cpu:3"])
@pytest.mark.parametrize("name", MODELS)
def test_twenty_steps_equal_those_of_one_device(name: str, devices: str, wrap) -> None:
    build, make_input = MODELS[name]
    for batch in (1, 2, 7, 32):
        torch.manual_seed(batch)
        module = build()
        reference = copy.deepcopy(module)
        runs = [
            (model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))
            for model in (wrap(module, devices), reference)
        ]
        for _ in range(20):
            x, y = make_input(batch), torch.randint(5, (batch,))
            for model, optimizer in runs:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
        assert relative_distance(module, reference) <= 1e-9, f"batch {batch}"


def data_parallel_by_hand(module: nn.Module, x: torch.Tensor, num_devices: int) -> torch.Tensor:
    """Do what nn.DataParallel does: replicas start from the first one's state, whose buffers are kept."""
    chunks = x.tensor_split(num_devices)
    others = []
    for chunk in chunks[1:]:
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        others.append(torch.func.functional_call(module, {**dict(module.named_parameters()), **buffers}, (chunk,)))
    return torch.cat([module(chunks[0]), *others])


@both_transports
@pytest.mark.parametrize("batch", [6, 7])
@pytest.mark.parametrize("num_devices", [2, 3])
def test_batch_norm_equals_data_parallel_by_hand(num_devices: int, batch: int, wrap) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    reference = copy.deepcopy(module)
    model = wrap(module, f"cpu:{num_devices}")
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (module, reference)]
    for _ in range(10):
        x = images(batch)
        for optimizer in optimizers:
            optimizer.zero_grad()
        model(x).pow(2).mean().backward()
        data_parallel_by_hand(reference, x, num_devices).pow(2).mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    assert relative_distance(module, reference) <= 1e-9
    for own, other in zip(module.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(own, other)
    model.eval()
    reference.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x), reference(x))


@both_transports
def test_evaluation_uses_all_devices(wrap) -> None:
    class Where(nn.Module):
        def forward(self, x):
            return torch.full((len(x),), os.getpid())

    model = wrap(Where(), "cpu:3", check="off").eval()
    with torch.no_grad():
        counts = model(torch.ones(7)).unique(return_counts=True)[1]
        assert sorted(counts.tolist()) == [2, 2, 3]
    with torch.inference_mode():
        assert len(model(torch.ones(7)).unique()) == 3
