"""Inputs and outputs of a wrapped model: any nesting; tensors are scattered and gathered, other values kept."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from duoka.data_parallel.scatter import Arguments


@dataclasses.dataclass
class Batch:
    x: torch.Tensor
    scale: float
    extra: Any = None


class Pair(NamedTuple):
    first: torch.Tensor
    second: Any


@dataclasses.dataclass
class ModelOutput(collections.OrderedDict):
    """Like Hugging Face's: a dataclass that is also a dictionary of its fields that are not None."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is not None:
                self[field.name] = getattr(self, field.name)

    def __setitem__(self, key, value) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def __reduce__(self):
        return type(self), tuple(getattr(self, field.name) for field in dataclasses.fields(self))


class Apply(nn.Module):
    """Calls a function: the shortest model."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(*args, **kwargs)


X = torch.arange(14.0).view(7, 2)

CASES = {
    "tensor": lambda x: x * 2,
    "tuple": lambda x: (x, x + 1),
    "list and none": lambda x: [x, None, [x * 3]],
    "dict": lambda x: {"a": x, "b": {"c": x.sum(1)}},
    "ordered dict": lambda x: collections.OrderedDict(a=x),
    "named tuple": lambda x: Pair(x, "word"),
    "dataclass": lambda x: Batch(x, 2.0, {"y": x}),
    "model output": lambda x: ModelOutput(logits=x * 2),
    "integers": lambda x: x.long(),
    "one list entry a sample": lambda x: [{"box": row, "n": 1} for row in x],
}


@pytest.mark.parametrize("devices", ["cpu:2", "cpu:3"])
@pytest.mark.parametrize("case", CASES)
def test_outputs_equal_those_of_one_device(case: str, devices: str, wrap) -> None:
    got, expected = wrap(Apply(CASES[case]), devices)(X), CASES[case](X)
    assert type(got) is type(expected)
    assert repr(got) == repr(expected)


def test_model_outputs_have_attributes_and_keys(wrap) -> None:
    out = wrap(Apply(lambda x: ModelOutput(loss=x.mean(), logits=x)))(X)
    torch.testing.assert_close(out.loss, X.mean())
    assert out["logits"].shape == (7, 2)


def test_arguments_of_every_kind_reach_every_device(wrap) -> None:
    def function(batch: Batch, factor, *, pair: Pair, names, weights):
        assert len(batch.x) == len(pair.first) == len(batch.extra["ids"])
        assert names == ["a", "b"]
        assert weights.shape == (4,)
        return batch.x * factor * batch.scale + pair.first + batch.extra["ids"][:, None] + weights.sum()

    def call(model):
        return model(
            Batch(X, 0.5, {"ids": torch.arange(7)}), 3, pair=Pair(X * 2, None), names=["a", "b"], weights=torch.ones(4)
        )

    torch.testing.assert_close(call(wrap(Apply(function), "cpu:3")), call(function))


def test_a_mean_is_that_of_all_samples(wrap) -> None:
    model = wrap(Apply(lambda x: x.mean()), "cpu:3")
    torch.testing.assert_close(model(X), X.mean())
    torch.testing.assert_close(model(X[:1]), X[:1].mean())


def test_scalars_become_a_vector_with_one_item_per_device_without_a_check(wrap) -> None:
    model = wrap(Apply(lambda x: x.mean()), "cpu:3", check="off")
    assert model(X[:6]).tolist() == [X[:2].mean(), X[2:4].mean(), X[4:6].mean()]
    assert model(X[:1]).shape == (1,)


def test_another_dimension_may_be_the_batch(wrap) -> None:
    model = wrap(Apply(lambda x: x * 2 + x.sum(0)), dim=1)
    x = torch.randn(3, 5)
    torch.testing.assert_close(model(x), x * 2 + x.sum(0))


def test_channels_last_inputs_stay_channels_last(wrap) -> None:
    def function(x):
        assert x.is_contiguous(memory_format=torch.channels_last)
        return x

    x = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    torch.testing.assert_close(wrap(Apply(function))(x), x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64, torch.uint8, torch.bool])
def test_tensors_of_every_dtype_travel(dtype: torch.dtype, wrap) -> None:
    x = torch.randint(2, (5, 3)).to(dtype)
    got = wrap(Apply(lambda x: x))(x)
    assert got.dtype is dtype
    assert torch.equal(got, x)


@pytest.mark.parametrize("batch", [0, 1, 2])
def test_a_batch_smaller_than_the_number_of_devices_uses_fewer(batch: int, wrap) -> None:
    assert wrap(Apply(lambda x: x + 1), "cpu:3")(torch.zeros(batch, 2)).shape == (batch, 2)


def test_calls_without_a_tensor_run_on_the_first_device(wrap) -> None:
    assert wrap(Apply(lambda word=None: word))("hello") == "hello"


@pytest.mark.parametrize(("batch", "devices"), [(7, 3), (32, 3), (1, 4), (4, 4), (5, 2)])
def test_chunks_are_those_of_tensor_split(batch: int, devices: int) -> None:
    expected = [len(part) for part in torch.empty(batch).tensor_split(devices) if len(part)]
    assert Arguments((torch.empty(batch),), {}).sizes(devices) == expected


def test_tuples_of_different_lengths_are_refused(wrap) -> None:
    with pytest.raises(ValueError, match="lengths"):
        wrap(Apply(lambda x: (x,) * len(x)), check="off")(X)


def test_containers_of_different_types_are_refused(wrap) -> None:
    with pytest.raises(ValueError, match="Pair, Tensor"):
        wrap(Apply(lambda x: Pair(x, x) if len(x) == 4 else x), check="off")(X)
    with pytest.raises(ValueError, match="Pair, Tensor"):
        wrap(Apply(lambda x: x if len(x) == 4 else Pair(x, x)), check="off")(X)
