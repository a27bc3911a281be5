"""Batch operations, which keep structure and classes."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from duoka.data import batch_length, concat_batches, split_batch, to_device
from duoka.errors import DataError


class Pair(NamedTuple):
    x: torch.Tensor
    names: list[str]


@dataclass(frozen=True)
class Record:
    x: torch.Tensor
    scale: float


class Encoding(UserDict):  # type: ignore[type-arg]
    """Like Hugging Face's BatchEncoding: a mapping that is no dict, built from more than its contents."""

    def __init__(self, data: dict[str, Any], encodings: str) -> None:
        super().__init__(data)
        self.encodings = encodings


LENGTH = 7
NAMES = list("abcdefg")
X = torch.arange(LENGTH * 2).reshape(LENGTH, 2)
BATCHES = {
    "tensor": X,
    "tuple": (X, X[:, 0]),
    "list of names": [X, NAMES],
    "tuple of names": (X, tuple(NAMES)),
    "dict": {"x": X, "scale": 3, "nested": {"y": X[:, 1], "names": NAMES}},
    "numbers without dimensions": (X, torch.tensor(3.0)),
    "numpy": {"x": np.arange(LENGTH), "y": X},
    "ordered": OrderedDict(x=X, y=X),
    "default": defaultdict(list, {"x": X}),
    "named tuple": Pair(X, NAMES),
    "dataclass": Record(X, 0.5),
    "encoding": Encoding({"input_ids": X, "attention_mask": X > 3}, "kept"),
    "a record a sample": (X, [{"box": torch.zeros(i, 4)} for i in range(LENGTH)]),
}


def plain(batch: Any) -> str:
    """All contents, with all classes, as text."""
    if isinstance(batch, UserDict):
        return f"{type(batch).__name__}({plain(dict(batch))}, {vars(batch).get('encodings')})"
    if isinstance(batch, dict):
        return f"{type(batch).__name__}({[(key, plain(value)) for key, value in batch.items()]})"
    return repr(batch)


@pytest.mark.parametrize("name", BATCHES)
def test_parts_joined_are_the_batch(name: str) -> None:
    batch = BATCHES[name]
    assert batch_length(batch) == LENGTH
    for parts in (1, 2, 3, 7):
        pieces = [split_batch(batch, index, parts) for index in range(parts)]
        assert [batch_length(piece) for piece in pieces] == [len(part) for part in torch.tensor_split(X, parts)]
        assert plain(concat_batches(pieces)) == plain(batch)
        assert all(type(piece) is type(batch) for piece in pieces)


@pytest.mark.parametrize("name", BATCHES)
def test_moving_keeps_the_structure_and_the_original(name: str) -> None:
    batch = BATCHES[name]
    before = plain(batch)
    moved = to_device(batch, torch.device("meta"))
    assert type(moved) is type(batch)
    assert plain(batch) == before
    assert plain(to_device(batch, "cpu")) == before


def test_every_tensor_of_a_nested_batch_is_moved() -> None:
    moved = to_device({"a": [X, (X, Record(X, 1.0))], "b": Encoding({"x": X}, "kept")}, "meta")
    found = [moved["a"][0], moved["a"][1][0], moved["a"][1][1].x, moved["b"]["x"]]
    assert {tensor.device.type for tensor in found} == {"meta"}


def test_objects_that_move_themselves_are_asked_to() -> None:
    packed = torch.nn.utils.rnn.pack_sequence([torch.zeros(2, 1)])
    assert to_device((packed,), "meta")[0].data.device.type == "meta"


def test_part_beyond_the_samples_is_empty() -> None:
    assert split_batch((torch.arange(2), ["a", "b"]), 2, 3)[1] == []


def test_tuple_of_as_many_columns_as_samples_is_cut_by_samples() -> None:
    records = [{"box": torch.zeros(3, 4)}, {"box": torch.zeros(1, 4)}]
    x, mine = split_batch((X[:2], records), 1, 2)
    assert (x.tolist(), mine) == (X[1:2].tolist(), records[1:])
    x, y = split_batch((X[:2], X[2:4]), 0, 2)
    assert (x.tolist(), y.tolist()) == (X[:1].tolist(), X[2:3].tolist())


@pytest.mark.parametrize(
    "inner",
    [
        [torch.arange(2), torch.arange(2) + 10],
        (torch.zeros(2, 4), torch.ones(2, 4)),
        [{"box": torch.zeros(2, 4)}, {"box": torch.ones(2, 4)}],
        [("a", "b"), ("c", "d")],
    ],
)
@pytest.mark.parametrize("batch", [lambda inner: (torch.zeros(2, 3), inner), lambda inner: {"x": X[:2], "y": inner}])
def test_list_that_may_be_one_tensor_a_sample_or_columns_is_an_error(batch: Any, inner: Any) -> None:
    with pytest.raises(DataError, match=r"batch of 2 samples .* of 2 entries .* in a dict, or join"):
        split_batch(batch(inner), 0, 2)


@pytest.mark.parametrize(
    "columns",
    [
        [torch.zeros(2, 4), torch.arange(2)],
        [torch.zeros(2, 4), torch.zeros(2, 5)],
        {"ids": torch.arange(2), "mask": torch.arange(2)},
        [torch.arange(2), torch.arange(2), torch.arange(2)],
    ],
)
def test_columns_within_a_batch_are_cut_as_columns(columns: Any) -> None:
    cut = split_batch((torch.zeros(2, 3), columns), 1, 2)[1]
    assert [len(column) for column in (cut.values() if isinstance(cut, dict) else cut)] == [1] * len(columns)


@pytest.mark.parametrize("rows", [(2, 1), (3, 3), (0, 0)])
def test_tensors_of_other_lengths_than_the_batch_are_one_a_sample(rows: tuple[int, int]) -> None:
    boxes = [torch.zeros(count, 4) for count in rows]
    assert split_batch((torch.zeros(2, 3), boxes), 0, 2)[1] is not boxes
    assert [len(box) for box in split_batch((torch.zeros(2, 3), boxes), 1, 2)[1]] == [rows[1]]


def test_tensor_of_another_length_is_an_error_with_both_numbers() -> None:
    with pytest.raises(DataError, match=r"of 7 samples .* shape \(3, 2\)"):
        split_batch((X, torch.zeros(3, 2)), 0, 2)


@pytest.mark.parametrize("other", [None, torch.ones(2), {"a": torch.ones(2)}, (torch.ones(2),)], ids=str)
def test_batches_of_different_structures_are_not_joined(other: Any) -> None:
    one, two = {"x": torch.zeros(2, 1), "m": {"b": torch.ones(2)}}, {"x": torch.zeros(2, 1), "m": other}
    for pair in ([one, two], [two, one], [two, {"x": torch.zeros(2, 1)}]):
        with pytest.raises(DataError, match=r"do not fit together: where one has .*, another has"):
            concat_batches(pair)


@pytest.mark.parametrize("batch", [{"a": 1}, 5, "text", torch.tensor(1.0)])
def test_batch_without_samples_is_an_error(batch: object) -> None:
    with pytest.raises(DataError, match="no tensor with dimensions"):
        batch_length(batch)
