"""Tensors inside nested values: take them out, put others in their place, split them, and join the parts' outputs."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

__all__ = ["Placeholder", "OutputSpec", "batch_size", "fill", "fill_with", "join", "part_sizes", "split", "take_out"]


class Placeholder(NamedTuple):
    """Stands for a tensor that was taken out: its number, and of which part's value."""

    number: int
    part: int = 0


def take_out(value: Any, part: int = 0) -> tuple[list[torch.Tensor], Any]:
    """Return the dense tensors in ``value``, and ``value`` with a ``Hole`` in the place of each."""
    tensors: list[torch.Tensor] = []

    def dig(leaf: Any) -> Any:
        if not is_dense(leaf):
            return leaf
        tensors.append(leaf)
        return Placeholder(len(tensors) - 1, part)

    return tensors, _map(dig, value)


def fill(value: Any, tensors: Sequence[Any]) -> Any:
    """Return ``value`` with the tensors back in their holes."""
    return _map(lambda leaf: tensors[leaf.number] if type(leaf) is Placeholder else leaf, value)


def fill_with(function: Callable[[Any], Any], value: Any) -> Any:
    """Return ``value`` with ``function`` of each leaf in its place."""
    return _map(function, value)


def is_dense(value: Any) -> bool:
    """Whether ``value`` is a tensor that lies in ordinary memory, to be sent as its bytes."""
    return isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_quantized


def batch_size(tensors: Sequence[torch.Tensor], dim: int) -> int | None:
    """Return the size along ``dim`` of the first tensor that has that dimension: it says how large the batch is."""
    return next((tensor.size(dim) for tensor in tensors if _has(tensor, dim)), None)


def part_sizes(batch: int | None, devices: int) -> list[int]:
    """Return how many samples each device gets, in order: as equal as can be, none of them 0, fewer devices if need be."""
    if batch is None or batch == 0:
        return [0]
    parts = min(batch, devices)
    return [batch // parts + (index < batch % parts) for index in range(parts)]


def split(tensor: torch.Tensor, sizes: Sequence[int], dim: int) -> Sequence[torch.Tensor]:
    """Return each device's part; a tensor of another size than the batch is not split, every device gets it whole."""
    if _has(tensor, dim) and tensor.size(dim) == sum(sizes):
        return torch.split(tensor, list(sizes), dim)
    return [tensor] * len(sizes)


class OutputSpec(NamedTuple):
    """Tensors of several parts that become one, or one tensor of one part that stays as it is."""

    holes: tuple[Placeholder, ...]
    is_joined: bool = True


def join(parts: Sequence[Any], sizes: Sequence[int]) -> tuple[Any, list[OutputSpec]]:
    """Return one value from the parts' values, with holes in it, and what belongs in each hole.

    Containers are joined item by item; a list with one item a sample becomes the list of all samples; of anything else
    the first part's is kept.
    """
    joints: list[OutputSpec] = []

    def put(joint: OutputSpec) -> Placeholder:
        joints.append(joint)
        return Placeholder(len(joints) - 1)

    return _join(parts, sizes, put), joints


def _join(parts: Sequence[Any], sizes: Sequence[int], put: Callable[[OutputSpec], Placeholder]) -> Any:
    first = parts[0]
    if type(first) is Placeholder:
        return put(OutputSpec(tuple(parts)))
    if isinstance(first, Mapping):
        return _rebuilt_mapping(first, {key: _join([part[key] for part in parts], sizes, put) for key in first})
    if _is_dataclass(first):
        names = [field.name for field in dataclasses.fields(first)]
        return _rebuilt_dataclass(first, {n: _join([getattr(part, n) for part in parts], sizes, put) for n in names})
    if isinstance(first, list) and _is_per_sample(parts, sizes):
        return [_map(lambda leaf: _alone(leaf, put), item) for part in parts for item in part]
    if isinstance(first, list | tuple):
        return _rebuilt_sequence(first, [_join(items, sizes, put) for items in zip(*_same_length(parts), strict=True)])
    return first


def _alone(leaf: Any, put: Callable[[OutputSpec], Placeholder]) -> Any:
    return put(OutputSpec((leaf,), is_joined=False)) if type(leaf) is Placeholder else leaf


def _same_length(parts: Sequence[Any]) -> Sequence[Any]:
    lengths = [len(part) for part in parts]
    if len(set(lengths)) > 1:
        raise ValueError(f"the model returned a {type(parts[0]).__name__} of other lengths on other devices: {lengths}")
    return parts


def _has(tensor: torch.Tensor, dim: int) -> bool:
    return -tensor.dim() <= dim < tensor.dim()


def _is_per_sample(parts: Sequence[Any], sizes: Sequence[int]) -> bool:
    """Whether each part's list has an item for each of its samples, and items are not whole batches themselves."""
    if any(len(part) != size for part, size in zip(parts, sizes, strict=True)):
        return False
    return len(set(sizes)) > 1 or not all(type(item) is Placeholder for part in parts for item in part)


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    if type(value) is Placeholder:
        return function(value)
    if isinstance(value, Mapping):
        return _rebuilt_mapping(value, {key: _map(function, item) for key, item in value.items()})
    if _is_dataclass(value):
        fields = dataclasses.fields(value)
        return _rebuilt_dataclass(value, {f.name: _map(function, getattr(value, f.name)) for f in fields})
    if isinstance(value, list | tuple):
        return _rebuilt_sequence(value, [_map(function, item) for item in value])
    return function(value)


def _is_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _rebuilt_sequence(like: Any, items: list[Any]) -> Any:
    if type(like) in (list, tuple):
        return type(like)(items)
    if hasattr(like, "_fields"):
        return type(like)(*items)
    return type(like)(items)


def _rebuilt_mapping(like: Any, items: dict[Any, Any]) -> Any:
    """A mapping of the same type: copied and given new values, because constructors differ (``defaultdict``)."""
    if type(like) is dict:
        return items
    new = copy.copy(like)
    for key, item in items.items():
        new[key] = item
    return new


def _rebuilt_dataclass(like: Any, items: dict[str, Any]) -> Any:
    new = copy.copy(like)
    for name, item in items.items():
        object.__setattr__(new, name, item)
    return new
