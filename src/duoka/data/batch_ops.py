"""Batches of any structure: how long one is, cutting it into parts, joining parts, moving it to a device.

A batch is a tensor, or tuples, lists, mappings, named tuples and dataclasses of batches, nested to any depth. Tensors and
NumPy arrays are cut along dimension 0; so are lists and tuples that hold one entry a sample (names, say); everything else
(a number, a string, a tensor without dimensions) belongs to the whole batch and is passed on as it is.

A list of 2 tensors with 2 rows each, in a batch of 2, may be one tensor a sample or 2 columns. The batch itself holds columns;
so does a list within it whose tensors differ in kind, and one that torch's ``default_collate`` made. Others are not guessed at.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from duoka.data.position import part_bounds
from duoka.errors import DataError

__all__ = ["batch_length", "concat_batches", "opened", "slice_batch", "split_batch", "to_device"]

Opened = tuple[list[Any], Callable[[list[Any]], Any]]


def batch_length(batch: Any) -> int:
    """Return how many samples ``batch`` holds: dimension 0 of its tensors.

    Raises ``DataError`` where there is no tensor with dimensions.

    >>> batch_length({"x": torch.zeros(5, 3), "y": torch.zeros(5)})
    5
    """
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], torch.Tensor) and batch[0].ndim:
        return len(batch[0])  # what nearly every loader yields, without walking through it
    for array in _arrays(batch):
        return len(array)
    if isinstance(batch, (list, tuple)) and batch and opened(batch[0]) is None:
        return len(batch)
    raise DataError(
        f"a batch of type {type(batch).__name__} holds no tensor with dimensions, so it cannot be cut into parts; a loader "
        "should yield tensors whose dimension 0 is the sample, or tuples, lists, dicts or dataclasses of them"
    )


def slice_batch(batch: Any, start: int, stop: int, length: int | None = None, *, has_columns: bool = False) -> Any:
    """Return samples ``start`` to ``stop`` of ``batch``, in the batch's own structure and classes.

    ``length`` is the batch's, where the caller knows it; ``has_columns`` says that its lists of tensors are columns, as
    those of ``default_collate`` are. Raises ``DataError`` where a tensor's dimension 0 is another than ``length``, and where a
    list within the batch may be one tensor a sample as well as columns.
    """
    length = batch_length(batch) if length is None else length
    if (start, stop) == (0, length):
        return batch
    if not has_columns:
        _check_lists(batch, length)
    return _cut(batch, length, slice(start, stop))


def split_batch(batch: Any, index: int, parts: int) -> Any:
    """Return part ``index`` of ``parts`` nearly equal, contiguous parts, as ``torch.tensor_split`` cuts: it may be empty.

    >>> split_batch((torch.arange(5), ["a", "b", "c", "d", "e"]), 1, 2)
    (tensor([3, 4]), ['d', 'e'])
    """
    length = batch_length(batch)
    return slice_batch(batch, *part_bounds(length, index, parts), length)


def concat_batches(batches: Sequence[Any]) -> Any:
    """Return one batch of all samples of ``batches``, which have one structure, in their order.

    What belongs to a whole batch is taken from the first. Raises ``DataError`` where tensors do not fit together.
    """
    if len(batches) == 1:
        return batches[0]
    return _join(list(batches), [batch_length(batch) for batch in batches])


def to_device(batch: Any, device: torch.device | str, non_blocking: bool = False) -> Any:
    """Return ``batch`` with its tensors on ``device``, in the batch's own structure and classes; the argument is kept.

    Objects that are no containers but have a method ``to`` (a ``PackedSequence``, say) are moved by it.
    """
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=non_blocking)
    if type(batch) is list or type(batch) is tuple:
        return type(batch)([to_device(item, device, non_blocking) for item in batch])
    if not isinstance(batch, (dict, UserDict)) and callable(move := getattr(batch, "to", None)):
        return move(device)
    inside = opened(batch)
    if inside is None:
        return batch
    children, rebuild = inside
    return rebuild([to_device(child, device, non_blocking) for child in children])


def _is_array(node: Any) -> bool:
    return isinstance(node, (torch.Tensor, np.ndarray))


def _arrays(node: Any) -> Iterator[Any]:
    """Yield the tensors and arrays of ``node`` that have dimensions."""
    if _is_array(node):
        if node.ndim:
            yield node
        return
    inside = opened(node)
    for child in inside[0] if inside else ():
        yield from _arrays(child)


def opened(node: Any) -> Opened | None:
    """Return what is in a container and how to build one like it of other contents; ``None`` for what is no container."""
    if isinstance(node, Mapping):
        return list(node.values()), lambda children: _like_mapping(node, children)
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return list(node), lambda children: type(node)(*children)
    if isinstance(node, (list, tuple)):
        return list(node), lambda children: type(node)(children)
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        names = [field.name for field in dataclasses.fields(node)]
        return [getattr(node, name) for name in names], lambda children: _like_dataclass(node, names, children)
    return None


def _like_mapping(node: Mapping[Any, Any], children: list[Any]) -> Any:
    if type(node) is dict:
        return dict(zip(node, children, strict=True))
    if hasattr(node, "__setitem__"):  # keeps the class and whatever else it holds: defaultdict, BatchEncoding
        like: Any = copy.copy(node)
        for key, child in zip(node, children, strict=True):
            like[key] = child
        return like
    return type(node)(dict(zip(node, children, strict=True)))  # type: ignore[call-arg]


def _like_dataclass(node: Any, names: list[str], children: list[Any]) -> Any:
    like = copy.copy(node)
    for name, child in zip(names, children, strict=True):
        object.__setattr__(like, name, child)  # frozen ones too
    return like


def _is_per_sample_list(node: Any, length: int, is_within: bool) -> bool:
    """Whether ``node`` is a list with one entry a sample, and not a structure whose tensors hold the samples."""
    if not isinstance(node, (list, tuple)) or hasattr(node, "_fields") or len(node) != length:
        return False
    sizes = {len(array) for array in _arrays(node)}
    if not sizes:
        return True
    is_columns = not is_within and _is_array(node[0]) and node[0].shape[:1] == (length,)
    return sizes != {length} and len({type(entry) for entry in node}) == 1 and not is_columns


def _check_lists(node: Any, length: int, is_within: bool = False) -> None:
    """Raise ``DataError`` where a list within the batch may be either one entry a sample or columns."""
    if _is_per_sample_list(node, length, is_within):
        return
    children = (opened(node) or ([],))[0]
    is_list = isinstance(node, (list, tuple)) and not hasattr(node, "_fields")
    if is_within and is_list and len(node) == length and any(True for _ in _arrays(node)) and _are_alike(children):
        raise DataError(
            f"a batch of {length} samples holds a {type(node).__name__} of {length} entries whose tensors have {length} rows "
            "each: that may be one entry a sample, or columns of the batch, which are cut in different ways. Name columns in a "
            "dict, or join one tensor a sample to one padded tensor; of a map-style data set nothing is cut"
        )
    for child in children:
        _check_lists(child, length, is_within=True)


def _are_alike(nodes: list[Any]) -> bool:
    """Whether ``nodes`` have one structure and tensors of one kind, as one entry a sample has."""
    return all(_kind(node) == _kind(nodes[0]) for node in nodes)


def _kind(node: Any) -> Any:
    if _is_array(node):
        return type(node), node.dtype, node.shape[1:]
    keys = list(node) if isinstance(node, Mapping) else None
    return type(node), keys, [_kind(child) for child in (opened(node) or ([],))[0]]


def _cut(node: Any, length: int, samples: slice, is_within: bool = False) -> Any:
    if _is_array(node):
        if node.ndim and len(node) != length:
            raise DataError(
                f"a batch of {length} samples holds a tensor of shape {tuple(node.shape)}; its dimension 0 should be "
                f"{length}. What is not one row a sample cannot be cut into parts: keep it out of the batch"
            )
        return node[samples] if node.ndim else node
    if _is_per_sample_list(node, length, is_within):
        return node[samples]
    inside = opened(node)
    if inside is None:
        return node
    children, rebuild = inside
    return rebuild([_cut(child, length, samples, is_within=True) for child in children])


def _join(nodes: list[Any], lengths: list[int], is_within: bool = False) -> Any:
    first = nodes[0]
    if _is_array(first):
        _check_structures(nodes)
        return _join_arrays(nodes) if first.ndim else first
    one_a_sample = [_is_per_sample_list(node, length, is_within) for node, length in zip(nodes, lengths, strict=True)]
    if all(one_a_sample) or (any(one_a_sample) and any(True for _ in _arrays(nodes))):  # one alone may look like either
        return type(first)([item for node in nodes for item in node])
    _check_structures(nodes)
    inside = [found for node in nodes if (found := opened(node)) is not None]
    if not inside:
        return first
    columns = zip(*(children for children, _ in inside), strict=True)
    return inside[0][1]([_join(list(column), lengths, is_within=True) for column in columns])


def _check_structures(nodes: list[Any]) -> None:
    """Raise ``DataError`` where ``nodes`` do not hold the same things, so that some of them would be lost."""
    shapes = [_structure(node) for node in nodes]
    other = next((shape for shape in shapes if shape != shapes[0]), None)
    if other is not None:
        raise DataError(
            f"batches do not fit together: where one has {shapes[0]}, another has {other}; let all batches have one structure"
        )


def _structure(node: Any) -> str:
    if _is_array(node):
        return "a tensor"
    inside = opened(node)
    if inside is None:
        return "None" if node is None else "no tensor"
    keys = f"the keys {', '.join(map(str, node))}" if isinstance(node, Mapping) else f"{len(inside[0])} entries"
    return f"a {type(node).__name__} with {keys}"


def _join_arrays(arrays: list[Any]) -> Any:
    try:
        return torch.cat(arrays) if isinstance(arrays[0], torch.Tensor) else np.concatenate(arrays)
    except (RuntimeError, ValueError) as error:
        shapes = ", ".join(str(tuple(array.shape)) for array in arrays)
        raise DataError(
            f"batches of shapes {shapes} do not fit into one global batch; pad them to one length, or use "
            'batch_size_means="global", which cuts each batch of the loader and joins none'
        ) from error
