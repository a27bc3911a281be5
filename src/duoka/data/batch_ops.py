"""Operations on batches of any structure: length, slice, split, concatenation, move to a device.

A batch is a tensor, or tuples, lists, mappings, named tuples and dataclasses of batches, nested to any depth. Tensors
and NumPy arrays are cut along dimension 0, and so are lists and tuples with one entry per sample (names, for example).
Everything else (a number, a string, a tensor without dimensions) belongs to the whole batch and is passed on.

A list of 2 tensors with 2 rows each, in a batch of 2, may have one tensor per sample or hold 2 columns. It holds columns
if it is the batch itself, if its tensors differ in kind, or if ``default_collate`` made it. Otherwise it is an error. The
same is true of a list of 2 lists with 2 strings each.
"""

from collections import UserDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from duoka.errors import DataError
from duoka.utils.partition import chunk_bounds
from duoka.utils.pytree import iter_leaves, open_container


def batch_length(batch: Any) -> int:
    """Return the number of samples in ``batch``: dimension 0 of its tensors.

    Raises ``DataError`` if there is no tensor with dimensions.

    >>> batch_length({"x": torch.zeros(5, 3), "y": torch.zeros(5)})
    5
    """
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], torch.Tensor) and batch[0].ndim:
        return len(batch[0])  # a short cut for the batches of nearly every loader
    for array in _arrays(batch):
        return len(array)
    if isinstance(batch, (list, tuple)) and batch and open_container(batch[0]) is None:
        return len(batch)
    raise DataError(
        f"a batch of type {type(batch).__name__} holds no tensor with dimensions, so it cannot be divided; a loader must "
        "yield tensors whose dimension 0 is the sample, or tuples, lists, dicts or dataclasses of them"
    )


def slice_batch(batch: Any, start: int, stop: int, length: int | None = None, *, has_columns: bool = False) -> Any:
    """Return samples ``start`` to ``stop`` of ``batch``, in the same structure and classes.

    ``length`` is the batch's, if the caller knows it. ``has_columns`` declares its lists of tensors and of lists to be
    columns, as those of ``default_collate`` are. Raises ``DataError`` if a tensor's dimension 0 differs from ``length``,
    or if a list in the batch may have one tensor per sample as well as columns.
    """
    length = batch_length(batch) if length is None else length
    if (start, stop) == (0, length):
        return batch
    if not has_columns:
        _check_lists(batch, length)
    return _cut(batch, length, slice(start, stop), has_columns)


def split_batch(batch: Any, index: int, parts: int) -> Any:
    """Return part ``index`` of ``parts`` nearly equal, contiguous parts, cut as by ``torch.tensor_split``; it may be empty.

    >>> split_batch((torch.arange(5), ["a", "b", "c", "d", "e"]), 1, 2)
    (tensor([3, 4]), ['d', 'e'])
    """
    length = batch_length(batch)
    return slice_batch(batch, *chunk_bounds(length, index, parts), length)


def concat_batches(batches: Sequence[Any], *, has_columns: bool = False) -> Any:
    """Return one batch of the samples of ``batches``, which have the same structure, in their order.

    Values that belong to a whole batch are those of the first. ``has_columns`` is that of ``slice_batch``. Raises
    ``DataError`` if tensors do not fit together.
    """
    if len(batches) == 1:
        return batches[0]
    return _join(list(batches), [batch_length(batch) for batch in batches], has_columns)


def to_device(batch: Any, device: torch.device | str, non_blocking: bool = False) -> Any:
    """Return a copy of ``batch`` with its tensors on ``device``, in the same structure and classes.

    Other objects with a method ``to`` (a ``PackedSequence``, for example) are moved by it.
    """
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=non_blocking)
    if type(batch) is list or type(batch) is tuple:
        return type(batch)([to_device(item, device, non_blocking) for item in batch])
    if not isinstance(batch, (dict, UserDict)) and callable(move := getattr(batch, "to", None)):
        return move(device)
    container = open_container(batch)
    if container is None:
        return batch
    children, rebuild = container
    return rebuild([to_device(child, device, non_blocking) for child in children])


def _is_array(node: Any) -> bool:
    return isinstance(node, (torch.Tensor, np.ndarray))


def _arrays(node: Any) -> Iterator[Any]:
    """Yield the tensors and arrays of ``node`` that have dimensions."""
    return (leaf for leaf in iter_leaves(node) if _is_array(leaf) and leaf.ndim)


def _children(node: Any) -> list[Any]:
    container = open_container(node)
    return [] if container is None else container[0]


def _is_per_sample_list(node: Any, length: int, is_within: bool, has_columns: bool) -> bool:
    """Whether ``node`` is a list with one entry per sample, and not a structure whose tensors hold the samples."""
    if not isinstance(node, (list, tuple)) or hasattr(node, "_fields") or len(node) != length:
        return False
    if has_columns:  # then entries that are no containers are those of the samples: strings
        return not any(_is_array(entry) or open_container(entry) for entry in node)
    sizes = {len(array) for array in _arrays(node)}
    if not sizes:
        return True
    is_columns = not is_within and _is_array(node[0]) and node[0].shape[:1] == (length,)
    return sizes != {length} and len({type(entry) for entry in node}) == 1 and not is_columns


def _check_lists(node: Any, length: int, is_within: bool = False) -> None:
    """Raise ``DataError`` if a list in the batch may have one entry per sample as well as columns."""
    children = _children(node)
    is_list = isinstance(node, (list, tuple)) and not hasattr(node, "_fields")
    is_square = is_within and is_list and len(node) == length and all(_kind(child) == _kind(node[0]) for child in node)
    has_columns_of_text = is_square and all(_is_text_column(child, length) for child in node)
    if _is_per_sample_list(node, length, is_within, has_columns=False) and not has_columns_of_text:
        return
    if has_columns_of_text or (is_square and any(True for _ in _arrays(node))):
        rows = "strings" if has_columns_of_text else "rows"
        raise DataError(
            f"a batch of {length} samples holds a {type(node).__name__} of {length} entries with {length} {rows} each: these "
            "may be one entry per sample or columns of the batch, which are cut in different ways. Name columns in a dict, or "
            "join one tensor per sample to one padded tensor; batches of a map-style data set need no cut"
        )
    for child in children:
        _check_lists(child, length, is_within=True)


def _is_text_column(node: Any, length: int) -> bool:
    """Whether ``node`` is a list of ``length`` strings, as many as there are samples."""
    return isinstance(node, (list, tuple)) and len(node) == length and all(isinstance(entry, str) for entry in node)


def _kind(node: Any) -> Any:
    """Return the structure and the kinds of tensors, which are the same for the entries of all samples."""
    if _is_array(node):
        return type(node), node.dtype, node.shape[1:]
    keys = list(node) if isinstance(node, Mapping) else None
    return type(node), keys, [_kind(child) for child in _children(node)]


def _cut(node: Any, length: int, samples: slice, has_columns: bool, is_within: bool = False) -> Any:
    if _is_array(node):
        if node.ndim and len(node) != length:
            raise DataError(
                f"a batch of {length} samples holds a tensor of shape {tuple(node.shape)}; its dimension 0 must be "
                f"{length}. A tensor without one row per sample cannot be divided: keep it out of the batch"
            )
        return node[samples] if node.ndim else node
    if _is_per_sample_list(node, length, is_within, has_columns):
        return node[samples]
    container = open_container(node)
    if container is None:
        return node
    children, rebuild = container
    return rebuild([_cut(child, length, samples, has_columns, is_within=True) for child in children])


def _join(nodes: list[Any], lengths: list[int], has_columns: bool, is_within: bool = False) -> Any:
    first = nodes[0]
    if _is_array(first):
        _check_structures(nodes)
        return _join_arrays(nodes) if first.ndim else first
    pairs = zip(nodes, lengths, strict=True)
    per_sample = [_is_per_sample_list(node, length, is_within, has_columns) for node, length in pairs]
    if all(per_sample) or (any(per_sample) and any(True for _ in _arrays(nodes))):  # one batch alone may be ambiguous
        return type(first)([item for node in nodes for item in node])
    _check_structures(nodes)
    containers = [container for node in nodes if (container := open_container(node)) is not None]
    if not containers:
        return first
    columns = zip(*(children for children, _ in containers), strict=True)
    return containers[0][1]([_join(list(column), lengths, has_columns, is_within=True) for column in columns])


def _check_structures(nodes: list[Any]) -> None:
    """Raise ``DataError`` if ``nodes`` differ in structure, so that some values would be lost."""
    first, *others = [_structure(node) for node in nodes]
    other = next((structure for structure in others if structure != first), None)
    if other is not None:
        raise DataError(
            f"batches do not fit together: where one has {first}, another has {other}; give all batches the same structure"
        )


def _structure(node: Any) -> str:
    if _is_array(node):
        return "a tensor"
    if open_container(node) is None:
        return "None" if node is None else "no tensor"
    keys = f"the keys {', '.join(map(str, node))}" if isinstance(node, Mapping) else f"{len(_children(node))} entries"
    return f"a {type(node).__name__} with {keys}"


def _join_arrays(arrays: list[Any]) -> Any:
    try:
        return torch.cat(arrays) if isinstance(arrays[0], torch.Tensor) else np.concatenate(arrays)
    except (RuntimeError, ValueError) as error:
        shapes = ", ".join(str(tuple(array.shape)) for array in arrays)
        raise DataError(
            f"batches of shapes {shapes} do not fit into one global batch; pad them to one length, or use "
            'batch_size_means="global", which divides each batch of the loader and joins none'
        ) from error
