"""Payloads and exceptions arrive in another process as they were sent."""

from __future__ import annotations

import functools
import os
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from duoka.workers.exceptions import call_user_code, deserialize_exception, serialize_exception
from duoka.workers.serialization import dumps, loads

CPU = torch.device("cpu")


def send(value):
    payload = dumps(value)
    try:
        return loads(payload, CPU)
    finally:
        payload.close()


LARGE = 1 << 19  # elements: more bytes than a pickle may hold


@pytest.mark.parametrize("count", [0, 1, 1000, LARGE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.int8, torch.bool])
def test_a_tensor_of_any_type_and_size_arrives_equal(count: int, dtype: torch.dtype) -> None:
    sent = torch.arange(count).to(dtype)
    got = send(sent)
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
def test_a_tensor_keeps_its_layout_and_type(make) -> None:
    sent = make()
    got = send(sent)
    assert type(got) is type(sent)
    assert (got.shape, got.layout, got.device, got.requires_grad) == (
        sent.shape,
        sent.layout,
        sent.device,
        sent.requires_grad,
    )
    if sent.device.type != "meta":
        assert torch.equal(got.to_dense(), sent.to_dense())


def test_torch_does_not_keep_sparse_tensors_that_were_received(tmp_path) -> None:
    send(torch.eye(4).to_sparse())
    torch.save(torch.ones(1), tmp_path / "file.pt")
    assert torch.load(tmp_path / "file.pt", weights_only=True) == 1  # torch would warn about tensors that it has kept


def test_tied_weights_stay_tied_and_an_optimizer_keeps_its_parameters() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
    model[1].weight = model[0].weight
    optimizer = torch.optim.Adam(model.parameters())
    model[1](torch.ones(1, 4)).sum().backward()
    optimizer.step()
    got_model, got_optimizer = send((model, optimizer))
    assert got_model[0].weight is got_model[1].weight
    assert got_optimizer.param_groups[0]["params"][0] is got_model[0].weight
    assert list(got_optimizer.state) == [got_model[0].weight]


def test_a_generator_continues_its_sequence() -> None:
    generator = torch.Generator().manual_seed(7)
    torch.rand(3, generator=generator)
    got = send(generator)
    assert torch.equal(torch.rand(5, generator=got), torch.rand(5, generator=generator))


@pytest.mark.parametrize("count", [3, LARGE])
def test_writes_to_the_copy_do_not_reach_the_original(count: int) -> None:
    tensor, array = torch.zeros(count), np.zeros(count)
    got_tensor, got_array = send((tensor, array))
    got_tensor += 1
    got_array += 1
    assert not tensor.any()
    assert not array.any()


def test_a_small_tensor_can_be_resized() -> None:
    assert send(torch.ones(3)).resize_(100).shape == (100,)


def test_no_descriptor_stays_open_after_a_large_payload() -> None:
    before = os.listdir("/proc/self/fd")
    got = send(torch.ones(LARGE))
    assert got.sum() == LARGE
    del got
    assert os.listdir("/proc/self/fd") == before


class PickyError(Exception):
    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")
        self.second = second


def throw(error: Exception) -> None:
    raise error


def raised(error: Exception) -> Exception:
    try:
        call_user_code(throw, error)
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
def test_an_exception_keeps_type_message_and_traceback(error: Exception) -> None:
    payload = serialize_exception(raised(error))
    got = deserialize_exception(payload, 3, "cpu:3", CPU)
    assert type(got) is type(error)
    assert str(got) == str(error)
    assert "Traceback of rank 3 (cpu:3)" in str(got.__cause__)
    assert "in throw" in str(got.__cause__)
    assert "in call_user_code" not in str(got.__cause__)


def test_an_object_that_cannot_be_pickled_raises_pickles_error() -> None:
    with pytest.raises((TypeError, pickle.PicklingError), match="generator"):
        dumps(number for number in [1])


def _double(number):
    return 2 * number


renamed = functools.lru_cache(8)(_double)


@functools.cache
def decorated(number):
    return 2 * number


def test_a_cached_function_arrives_with_its_limit() -> None:
    @functools.lru_cache(5)
    def power(number):
        return 2 * power(number - 1) if number else 1

    assert send(decorated) is decorated
    assert send(power)(4) == 16
    got = send([renamed, renamed])
    assert got[0] is got[1]
    assert (got[0](4), got[0].cache_parameters()["maxsize"]) == (8, 8)
