"""``shard``: what the ranks of a launch have together is what one process has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import duoka
from duoka.data import shard
from duoka.errors import ConfigError, DataError
from support.datasets import Batches, Numbers, flat, numbers

pytestmark = pytest.mark.usefixtures("pickle_by_value")


def first_column(batch: Any) -> list[int]:
    return (batch[0] if isinstance(batch, (list, tuple)) else batch).tolist()


def epochs(loader: Any, count: int = 2, **options: Any) -> list[list[list[int]]]:
    batches = shard(loader, **options)
    return [[first_column(batch) for batch in batches] for _ in range(count)]


def together(ranks: list[list[list[list[int]]]]) -> list[list[list[int]]]:
    """Join the parts of each batch: ``[epoch][batch]`` is a list of samples."""
    return [[flat(list(parts)) for parts in zip(*epoch, strict=True)] for epoch in zip(*ranks, strict=True)]


LOADERS = {
    "shuffled": lambda: numbers(11, batch_size=4, shuffle=True),
    "workers": lambda: numbers(11, batch_size=4, shuffle=True, num_workers=1),
    "without the last batch": lambda: numbers(11, batch_size=4, shuffle=True, drop_last=True),
    "stream": lambda: DataLoader(Numbers(11, shuffled=True), batch_size=4),
    "ready batches": lambda: Batches(11),
    "resident": lambda: duoka.data.resident((torch.arange(11), torch.arange(11)), batch_size=4, shuffle=True),
}


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", LOADERS)
def test_ranks_have_together_the_batches_of_one_process(name: str, size: int) -> None:
    expected = epochs(LOADERS[name]())
    assert together(duoka.launch(epochs, LOADERS[name](), devices=f"cpu:{size}", returns="all")) == expected
    assert [len(batch) for batch in expected[0]] == [4, 4] if "without" in name else [4, 4, 3]
    assert expected[0] != expected[1]


def evaluated(loader: Any) -> list[list[list[int]]]:
    return epochs(loader, training=False)


def test_in_evaluation_each_sample_counts_once_and_orders_repeat() -> None:
    ranks = duoka.launch(evaluated, numbers(9, batch_size=4, shuffle=True), devices="cpu:3", returns="all")
    for rank in ranks:
        assert rank[0] == rank[1]
    samples = [sample for rank in ranks for batch in rank[0] for sample in batch]
    assert sorted(samples) == list(range(9))


def weights_after(loader: Any) -> torch.Tensor:
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    call = DistributedDataParallel(model) if duoka.current_world().size > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = shard(loader)
    for _ in range(2):
        for features, target in batches:
            optimizer.zero_grad()
            (functional.mse_loss(call(features), target) * batches.loss_scale).backward()
            optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("samples", [8, 10, 11, 9])
def test_a_loop_of_ones_own_takes_the_steps_of_one_process(samples: int) -> None:
    features = torch.randn(samples, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    loader = DataLoader(TensorDataset(features, features.sum(1, keepdim=True)), batch_size=4, shuffle=True)
    expected = weights_after(loader)
    for weights in duoka.launch(weights_after, loader, devices="cpu:3", returns="all"):
        assert torch.allclose(weights, expected, rtol=1e-9)


def next_epoch(batches: Any) -> list[list[int]]:
    return [first_column(batch) for batch in batches]


def test_a_loader_made_before_the_launch_is_divided_in_it_and_goes_on() -> None:
    batches = shard(numbers(8, batch_size=4, shuffle=True))
    reference = shard(numbers(8, batch_size=4, shuffle=True))
    assert len(batches) == 2
    for _ in range(2):
        parts = duoka.launch(next_epoch, batches, devices="cpu:2", returns="all")
        assert together([[part] for part in parts]) == [next_epoch(reference)]
    assert next_epoch(batches) == next_epoch(reference)  # in one process again


class SplitsItself(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(torch.distributed.get_rank(), 12, 2))


def test_a_stream_that_splits_itself_is_an_error() -> None:
    with pytest.raises(DataError, match="DataLoader yields other samples on another rank"):
        duoka.launch(epochs, DataLoader(SplitsItself(), batch_size=4), devices="cpu:2")


def iterate_unequally(batches: Any) -> None:
    if duoka.current_world().rank:
        batches._epoch += 1  # as after an iteration of its own
    list(batches)


def test_ranks_in_different_epochs_are_an_error() -> None:
    with pytest.raises(DataError, match=r"different epochs of the loader \(0, 1 by rank\)"):
        duoka.launch(iterate_unequally, shard(numbers(8, batch_size=4)), devices="cpu:2")


def test_what_is_no_loader_is_an_error_at_once() -> None:
    with pytest.raises(ConfigError, match="wrap it"):
        shard(TensorDataset(torch.arange(4)))
