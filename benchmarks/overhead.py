"""Time of a training step with a plain PyTorch loop, duoka, Lightning Fabric, Accelerate and Lightning's Trainer.

One process, one thread, and a model so small that mostly overhead remains. All loops run in turn, round after round, so
that other load on the machine affects all of them. The model notes when its forward begins: a step lasts from one
forward to the next, loading included. The table has the median over rounds of each round's median step, the least of
these medians, and the median over rounds of the ratio to the plain loop of the same round.

    python benchmarks/overhead.py [--rounds 15] [--steps 300] [--data tensors|rows]
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import logging
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, TensorDataset

BATCH = 32
WARM_UP_STEPS = 30


class Rows(Dataset):
    """A data set as users write one, which loads one sample at a time."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        return tuple(tensor[index] for tensor in self.tensors)


class Timed(nn.Module):
    """A multilayer perceptron, 32 to 64 to 10, that notes the time of each call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))
        self.began: list[float] = []

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        self.began.append(time.perf_counter())
        return self.layers(features)


def loader(steps: int, kind: str) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(steps * BATCH, 32, generator=generator)
    target = torch.randint(10, (steps * BATCH,), generator=generator)
    dataset = TensorDataset(features, target) if kind == "tensors" else Rows(features, target)
    return DataLoader(dataset, batch_size=BATCH, shuffle=True, num_workers=0)


def raw(net: nn.Module, data: DataLoader) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for features, target in data:
        loss = functional.cross_entropy(net(features), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def duoka(net: nn.Module, data: DataLoader) -> None:
    from duoka.trainer import Trainer

    options = {"optimizer": "sgd", "lr": 0.01, "epochs": 1, "device": "cpu", "verbose": False}
    Trainer(net, data, loss=functional.cross_entropy, **options).fit()


def fabric(net: nn.Module, data: DataLoader) -> None:
    from lightning.fabric import Fabric

    helper = Fabric(accelerator="cpu", devices=1)
    wrapped, optimizer = helper.setup(net, torch.optim.SGD(net.parameters(), lr=0.01))
    for features, target in helper.setup_dataloaders(data):
        loss = functional.cross_entropy(wrapped(features), target)
        helper.backward(loss)
        optimizer.step()
        optimizer.zero_grad()


def accelerate(net: nn.Module, data: DataLoader) -> None:
    from accelerate import Accelerator

    helper = Accelerator(cpu=True)
    wrapped, optimizer, batches = helper.prepare(net, torch.optim.SGD(net.parameters(), lr=0.01), data)
    for features, target in batches:
        loss = functional.cross_entropy(wrapped(features), target)
        helper.backward(loss)
        optimizer.step()
        optimizer.zero_grad()


def lightning(net: nn.Module, data: DataLoader) -> None:
    import lightning as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: Any, _index: int) -> torch.Tensor:
            features, target = batch
            return functional.cross_entropy(self.net(features), target)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    pl.Trainer(accelerator="cpu", devices=1, max_epochs=1, **quiet).fit(Module(), data)


Loop = Callable[[nn.Module, DataLoader], None]
LOOPS: dict[str, tuple[Loop, str]] = {
    "raw PyTorch": (raw, "torch"),
    "duoka Trainer": (duoka, "duoka"),
    "Lightning Fabric": (fabric, "lightning"),
    "Accelerate": (accelerate, "accelerate"),
    "Lightning Trainer": (lightning, "lightning"),
}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the other libraries."""
    logging.getLogger("lightning").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings(), open(os.devnull, "w") as nothing, contextlib.redirect_stderr(nothing):
        warnings.simplefilter("ignore")
        yield


def median_step_s(loop: Loop, steps: int, kind: str) -> float:
    net = Timed()
    with quiet():
        loop(net, loader(steps, kind))
    began = net.began[WARM_UP_STEPS:]
    return statistics.median(after - before for before, after in itertools.pairwise(began))


def measure(rounds: int, steps: int, kind: str) -> dict[str, list[float]]:
    loops = {name: loop for name, (loop, needed) in LOOPS.items() if importlib.util.find_spec(needed)}
    times: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(rounds + 1):
        for name, loop in loops.items():
            step_s = median_step_s(loop, steps, kind)
            if number:  # the first round imports and warms up
                times[name].append(step_s)
    return times


def report(times: dict[str, list[float]], kind: str, steps: int) -> None:
    first = next(iter(times.values()))
    print(f"\n{kind}: {len(first)} rounds of {steps} steps, batch {BATCH}, DataLoader(num_workers=0), one thread")
    print(f"{'':20}{'median us':>12}{'least us':>12}{'to raw':>9}")
    for name, seconds in times.items():
        ratio = statistics.median(one / other for one, other in zip(seconds, first, strict=True))
        print(f"{name:20}{statistics.median(seconds) * 1e6:12.1f}{min(seconds) * 1e6:12.1f}{ratio:9.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--data", choices=("tensors", "rows", "both"), default="both")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores"
    )
    for kind in ("tensors", "rows") if options.data == "both" else (options.data,):
        report(measure(options.rounds, options.steps, kind), kind, options.steps)


if __name__ == "__main__":
    main()
