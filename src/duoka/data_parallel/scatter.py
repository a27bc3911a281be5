"""Scatter: which arguments of a call are split along the batch, and each device's part of them."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import PackedSequence

from duoka.data_parallel.placeholders import PerSample, Placeholder, insert_tensors, is_dense, map_values, open_value
from duoka.utils.partition import chunk_sizes


class Part(NamedTuple):
    """One device's part of the arguments: tensors, and ``(args, kwargs)`` with placeholders for them."""

    tensors: list[torch.Tensor]
    structure: Any

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return ``args`` and ``kwargs`` with the tensors in place."""
        args, kwargs = insert_tensors(self.structure, self.tensors)
        return args, kwargs


class Arguments:
    """Arguments of a call, and which of them are split.

    The batch size is the size along ``dim`` of the first tensor or array; a list of tensors of different sizes has one
    item a sample. Split are: tensors and arrays of the batch's size, and lists and tuples of its length, unless
    their tensors have the batch's size themselves.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], dim: int = 0) -> None:
        self.dim = dim
        self.tensors: list[torch.Tensor] = []
        self.refusal = ""
        """Why the arguments cannot be split; empty if they can."""
        self.batch: int | None = _batch_size((*args, *kwargs.values()), dim)
        self.shares: dict[tuple[int, ...], dict[Any, tuple[float, ...]]] = {}
        """What ``shares_of`` has computed, by the sizes of the parts."""
        self._item_of: list[int | None] = []
        """For a tensor of a per-sample list, the sample."""
        self._has_items = False
        self.structure: Any = (
            tuple(self._open(value) for value in args),
            {name: self._open(value) for name, value in kwargs.items()},
        )

    def whole(self) -> Part:
        """Return the arguments as they are."""
        return Part(self.tensors, self.structure)

    def sizes(self, num_devices: int, *, minimum: int = 1) -> list[int]:
        """Return nearly equal numbers of samples for the devices, at least ``minimum`` for each used device."""
        if not self.batch or self.refusal:
            return [0]
        return chunk_sizes(self.batch, max(1, min(self.batch // minimum, num_devices)))

    def is_split(self, index: int) -> bool:
        """Return whether the tensor is split along ``dim``."""
        return self._item_of[index] is None and _has_size(self.tensors[index], self.dim, self.batch)

    def parts(self, sizes: Sequence[int]) -> list[Part]:
        """Return each device's part."""
        columns: list[Sequence[torch.Tensor]] = []
        bounds = _bounds(sizes)
        for index, tensor in enumerate(self.tensors):
            item = self._item_of[index]
            if self.is_split(index):
                columns.append(torch.split(tensor, list(sizes), self.dim))
            elif item is None:
                columns.append([tensor] * len(sizes))
            else:
                columns.append([tensor if start <= item < stop else tensor.new_empty(0) for start, stop in bounds])
        tensors = [list(own) for own in zip(*columns, strict=True)] if columns else [[] for _ in sizes]
        return [Part(own, self._structure(*bound)) for own, bound in zip(tensors, bounds, strict=True)]

    def head(self, size: int) -> "Arguments":
        """Return the arguments for the first samples."""
        assert self.batch is not None
        if size == self.batch:
            return self
        first = copy.copy(self)
        first.tensors, first.structure = self.parts([size, self.batch - size])[0]
        first.batch, first.shares = size, {}
        return first

    def _structure(self, start: int, stop: int) -> Any:
        if not self._has_items:
            return self.structure
        return map_values(lambda leaf: leaf.slice(start, stop) if type(leaf) is PerSample else leaf, self.structure)

    def _open(self, value: Any, item: int | None = None) -> Any:
        if is_dense(value):
            self.tensors.append(value)
            self._item_of.append(item)
            return Placeholder(len(self.tensors) - 1)
        if isinstance(value, PackedSequence):
            self.refusal = "a PackedSequence among its arguments cannot be split; give the padded sequences and lengths"
            return value
        if isinstance(value, torch.Tensor):
            if self.batch is None or (value.dim() and value.size(0) == self.batch):
                kind = "nested" if value.is_nested else "quantized" if value.is_quantized else "sparse"
                self.refusal = f"a {kind} tensor among its arguments cannot be split; give a dense one"
            return value
        if item is None and self._is_per_sample(value):
            self._has_items = True
            items = value if isinstance(value, np.ndarray) else [self._open(one, i) for i, one in enumerate(value)]
            return PerSample(items, type(value))
        opened = open_value(value)
        if opened is None:
            return value
        children, rebuild = opened
        return rebuild([self._open(child, item) for child in children])

    def _is_per_sample(self, value: Any) -> bool:
        if self.batch is None or self.dim != 0:
            return False
        if isinstance(value, np.ndarray):
            return value.ndim > 0 and len(value) == self.batch
        if type(value) not in (list, tuple) or len(value) != self.batch:
            return False
        if not _is_one_kind(value):
            return False
        tensors = list(_dense_tensors(value))
        return not tensors or not all(_has_size(tensor, 0, self.batch) for tensor in tensors)


def _batch_size(values: Sequence[Any], dim: int) -> int | None:
    """Return the size of the first value that has a batch; else the length of the first list of strings."""
    found = next((size for value in values for size in _sizes(value, dim)), None)
    if found is None and dim == 0:
        texts = (v for v in values if isinstance(v, list) and v and all(isinstance(item, str) for item in v))
        found = next((len(value) for value in texts), None)
    return found


def _sizes(value: Any, dim: int) -> Iterator[int]:
    if is_dense(value):
        if -value.dim() <= dim < value.dim():
            yield value.size(dim)
    elif isinstance(value, np.ndarray):
        if dim == 0 and value.ndim and value.dtype != object:
            yield len(value)
    elif isinstance(value, list | tuple) and dim == 0 and _is_ragged(value):
        yield len(value)
    elif not isinstance(value, PackedSequence) and (opened := open_value(value)) is not None:
        for child in opened[0]:
            yield from _sizes(child, dim)


def _is_ragged(values: Sequence[Any]) -> bool:
    """Return whether these are tensors that differ in their first sizes only: one a sample."""
    if not all(is_dense(value) and value.dim() for value in values):
        return False
    return len({(value.dtype, value.shape[1:]) for value in values}) == 1 and len({len(value) for value in values}) > 1


def _is_one_kind(values: Sequence[Any]) -> bool:
    return len({type(value) for value in values if value is not None}) == 1


def _dense_tensors(value: Any) -> Iterator[torch.Tensor]:
    if is_dense(value):
        yield value
    elif (opened := open_value(value)) is not None:
        for child in opened[0]:
            yield from _dense_tensors(child)


def _has_size(tensor: torch.Tensor, dim: int, size: int | None) -> bool:
    return -tensor.dim() <= dim < tensor.dim() and tensor.size(dim) == size


def _bounds(sizes: Sequence[int]) -> list[tuple[int, int]]:
    stops = np.cumsum(sizes).tolist()
    return list(zip([0, *stops], stops, strict=False))
