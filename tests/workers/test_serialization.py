"""What travels between processes arrives as it was, whatever it is made of."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from duoka.workers import exceptions
from duoka.workers.serialization import dumps, loads

CPU = torch.device("cpu")


def travel(value):
    payload = dumps(value)
    try:
        return loads(payload, CPU)
    finally:
        payload.close()


LARGE = 1 << 19  # elements: well above what stays in the pickle


@pytest.mark.parametrize("count", [0, 1, 1000, LARGE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.int8, torch.bool])
def test_a_tensor_of_any_type_and_size_arrives_equal(count: int, dtype: torch.dtype) -> None:
    sent = torch.arange(count).to(dtype)
    got = travel(sent)
    assert got.dtype == dtype
    assert torch.equal(got, sent)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.arange(LARGE * 2.0).view(2, -1).t(),
        lambda: torch.arange(LARGE * 2.0)[5::3],
        lambda: torch.eye(4).to_sparse(),
        lambda: torch.eye(4).to_sparse_csr(),
        lambda: nn.Parameter(torch.ones(3), requires_grad=False),
        lambda: torch.empty(3, device="meta"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*[Ss]parse CSR")
def test_layouts_and_kinds_of_tensors_are_kept(make) -> None:
    sent = make()
    got = travel(sent)
    assert type(got) is type(sent)
    assert (got.shape, got.layout, got.device, got.requires_grad) == (
        sent.shape,
        sent.layout,
        sent.device,
        sent.requires_grad,
    )
    if sent.device.type != "meta":
        assert torch.equal(got.to_dense(), sent.to_dense())


def test_sparse_tensors_that_travelled_are_kept_by_nobody(tmp_path) -> None:
    travel(torch.eye(4).to_sparse())
    torch.save(torch.ones(1), tmp_path / "file.pt")
    assert torch.load(tmp_path / "file.pt", weights_only=True) == 1  # torch would warn of what it had kept


def test_tied_weights_stay_tied_and_an_optimizer_keeps_its_parameters() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
    model[1].weight = model[0].weight
    optimizer = torch.optim.Adam(model.parameters())
    model[1](torch.ones(1, 4)).sum().backward()
    optimizer.step()
    got_model, got_optimizer = travel((model, optimizer))
    assert got_model[0].weight is got_model[1].weight
    assert got_optimizer.param_groups[0]["params"][0] is got_model[0].weight
    assert list(got_optimizer.state) == [got_model[0].weight]


def test_a_generator_goes_on_where_it_was() -> None:
    generator = torch.Generator().manual_seed(7)
    torch.rand(3, generator=generator)
    got = travel(generator)
    assert torch.equal(torch.rand(5, generator=got), torch.rand(5, generator=generator))


@pytest.mark.parametrize("count", [3, LARGE])
def test_what_arrives_can_be_written_and_what_was_sent_stays(count: int) -> None:
    tensor, array = torch.zeros(count), np.zeros(count)
    got_tensor, got_array = travel((tensor, array))
    got_tensor += 1
    got_array += 1
    assert not tensor.any()
    assert not array.any()


def test_small_tensors_can_be_resized_as_ordinary_ones() -> None:
    assert travel(torch.ones(3)).resize_(100).shape == (100,)


def test_nothing_stays_open_after_a_large_payload() -> None:
    before = os.listdir("/proc/self/fd")
    got = travel(torch.ones(LARGE))
    assert got.sum() == LARGE
    del got
    assert os.listdir("/proc/self/fd") == before


class PickyError(Exception):
    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")
        self.second = second


def raised(error: Exception) -> Exception:
    try:
        raise error
    except Exception as caught:
        return caught


@pytest.mark.parametrize(
    "error",
    [
        PickyError(1, 2),
        UnicodeDecodeError("utf-8", b"x", 0, 1, "why"),
        FileNotFoundError(2, "No such file", "data.csv"),
        KeyError("name"),
        ExceptionGroup("both", [ValueError(1), TypeError(2)]),
        torch.OutOfMemoryError("out of memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_exception_arrives_as_its_own_type_with_words_and_traceback(error: Exception) -> None:
    payload = exceptions.pack(raised(error))
    got = exceptions.unpack(payload, 3, "cpu:3", CPU)
    assert type(got) is type(error)
    assert str(got) == str(error)
    assert "Traceback of rank 3 (cpu:3)" in str(got.__cause__)
    assert "in raised" in str(got.__cause__)


def test_what_cannot_be_pickled_is_said_by_pickle_itself() -> None:
    with pytest.raises((TypeError, pickle.PicklingError), match="generator"):
        dumps(number for number in [1])
