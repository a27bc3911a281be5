"""Scatter and gather of nested values: extract tensors, split a batch, and merge outputs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from duoka.utils.partition import chunk_sizes
from duoka.utils.pytree import map_leaves, open_container


class Placeholder(NamedTuple):
    """Stands for an extracted tensor: its position, and the chunk whose value it belongs to."""

    position: int
    chunk: int = 0


class OutputSpec(NamedTuple):
    """One output tensor: tensors of all chunks to concatenate, or one chunk's tensor as it is."""

    placeholders: tuple[Placeholder, ...]
    is_concatenated: bool = True


def extract_tensors(value: Any, chunk: int = 0) -> tuple[list[torch.Tensor], Any]:
    """Return the dense tensors in ``value``, and ``value`` with a ``Placeholder`` for each."""
    tensors: list[torch.Tensor] = []

    def extract(leaf: Any) -> Any:
        if not _is_dense(leaf):
            return leaf
        tensors.append(leaf)
        return Placeholder(len(tensors) - 1, chunk)

    return tensors, map_values(extract, value)


def insert_tensors(structure: Any, tensors: Sequence[Any]) -> Any:
    """Return ``structure`` with tensors in place of its placeholders."""
    return map_values(lambda leaf: tensors[leaf.position] if _is_placeholder(leaf) else leaf, structure)


def insert_on_device(structure: Any, tensors: Sequence[torch.Tensor], device: torch.device) -> Any:
    """Return ``structure`` with the tensors in place, moved to ``device`` as ``torch.nn.DataParallel`` does."""
    return insert_tensors(structure, [tensor.to(device, non_blocking=True) for tensor in tensors])


def map_values(function: Callable[[Any], Any], value: Any) -> Any:
    """Return ``value`` with ``function(leaf)`` in place of each leaf; placeholders are leaves."""
    return map_leaves(function, value, _is_placeholder)


def batch_size(tensors: Sequence[torch.Tensor], dim: int) -> int | None:
    """Return the batch size: the size along ``dim`` of the first tensor that has this dimension."""
    return next((tensor.size(dim) for tensor in tensors if _has_dim(tensor, dim)), None)


def scatter_sizes(batch: int | None, num_devices: int) -> list[int]:
    """Return nearly equal numbers of samples for the devices, at least one for each used device."""
    return [0] if not batch else chunk_sizes(batch, min(batch, num_devices))


def scatter(tensor: torch.Tensor, sizes: Sequence[int], dim: int) -> Sequence[torch.Tensor]:
    """Return each device's chunk; a tensor that is not of the batch's size is not split."""
    if _has_dim(tensor, dim) and tensor.size(dim) == sum(sizes):
        return torch.split(tensor, list(sizes), dim)
    return [tensor] * len(sizes)


def gather_structures(structures: Sequence[Any], sizes: Sequence[int]) -> tuple[Any, list[OutputSpec]]:
    """Return one structure for the chunks' structures, and the spec of each tensor in it.

    Containers are merged item by item. A list with one item a sample becomes the list of all
    samples. Of any other value, the first chunk's is kept.
    """
    specs: list[OutputSpec] = []

    def add(spec: OutputSpec) -> Placeholder:
        specs.append(spec)
        return Placeholder(len(specs) - 1)

    return _merge(structures, sizes, add), specs


def gather_tensors(spec: OutputSpec, tensors: Sequence[Sequence[torch.Tensor]], dim: int) -> torch.Tensor:
    """Return the chunks' tensors concatenated along ``dim``; scalars become a vector."""
    chunks = [tensors[placeholder.chunk][placeholder.position] for placeholder in spec.placeholders]
    if not spec.is_concatenated:
        return chunks[0].clone()
    return torch.stack(chunks) if chunks[0].dim() == 0 else torch.cat(chunks, dim)


def _merge(values: Sequence[Any], sizes: Sequence[int], add: Callable[[OutputSpec], Placeholder]) -> Any:
    def keep_single(leaf: Any) -> Any:
        return add(OutputSpec((leaf,), is_concatenated=False)) if _is_placeholder(leaf) else leaf

    first = values[0]
    if _is_placeholder(first):
        if not all(map(_is_placeholder, values)):
            raise _different_types(values)
        return add(OutputSpec(tuple(values)))
    if isinstance(first, list) and _is_per_sample(values, sizes):
        return [map_values(keep_single, item) for value in values for item in value]
    container = open_container(first)
    if container is None:
        return first
    if isinstance(first, list | tuple) and len({len(value) for value in values}) > 1:
        lengths = [len(value) for value in values]
        raise ValueError(f"the model returned a {type(first).__name__} of different lengths per device: {lengths}")
    if isinstance(first, Mapping):
        columns = [[value[key] for value in values] for key in first]
    else:
        columns = [list(column) for column in zip(*(_children(value, values) for value in values), strict=True)]
    return container[1]([_merge(column, sizes, add) for column in columns])


def _children(value: Any, values: Sequence[Any]) -> list[Any]:
    container = None if _is_placeholder(value) else open_container(value)
    if container is None:
        raise _different_types(values)
    return container[0]


def _different_types(values: Sequence[Any]) -> ValueError:
    names = {"Tensor" if _is_placeholder(value) else type(value).__name__ for value in values}
    return ValueError(f"the model returned different types on different devices: {', '.join(sorted(names))}")


def _is_per_sample(values: Sequence[Any], sizes: Sequence[int]) -> bool:
    """Return whether each list has one item a sample, and items are not whole batches themselves."""
    if any(len(value) != size for value, size in zip(values, sizes, strict=True)):
        return False
    kinds = {type(item) for value in values for item in value}
    return len(kinds) == 1 and (len(set(sizes)) > 1 or kinds != {Placeholder})


def _is_placeholder(value: Any) -> bool:
    return type(value) is Placeholder


def _is_dense(value: Any) -> bool:
    """Return whether ``value`` is a tensor in ordinary memory, which can travel as bytes."""
    return isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_quantized


def _has_dim(tensor: torch.Tensor, dim: int) -> bool:
    return -tensor.dim() <= dim < tensor.dim()
