"""Conversion of state to the types that a checkpoint may hold: numbers, text, tensors, and containers of them."""

from collections import Counter, OrderedDict, defaultdict
from typing import Any

import numpy as np
import torch

from duoka.errors import CheckpointError
from duoka.utils.pytree import iter_tensors

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device)


def to_plain_types(state: Any, name: str = "state") -> Any:
    """Return ``state`` with tensors on the CPU, NumPy's arrays as tensors, and NumPy's scalars as Python's.

    Raises:
        CheckpointError: only running code could load a value again; the message names its place and type.

    """
    return _Converter().convert(state, name)


def tensor_bytes(state: Any) -> int:
    """Return the size of the tensors in a plain ``state``; a tensor that occurs twice counts once."""
    return sum({id(tensor): tensor.numel() * tensor.element_size() for tensor in iter_tensors(state)}.values())


class _Converter:
    """Converts one state; names of the same tensor get the same converted tensor."""

    def __init__(self) -> None:
        self.seen: dict[tuple[Any, ...], torch.Tensor] = {}
        self.sources: list[torch.Tensor] = []  # kept alive, so that no address in `seen` is used twice

    def convert(self, value: Any, name: str) -> Any:
        if type(value) in _PLAIN:
            return value
        if isinstance(value, torch.Tensor):
            return self.tensor(value, name)
        if isinstance(value, np.generic):
            return self.convert(value.item(), name)
        if isinstance(value, np.ndarray):
            return self.array(value, name)
        if type(value) in (dict, OrderedDict, Counter, defaultdict):
            return self.mapping(value, name)
        if type(value) in (list, tuple):
            return type(value)(self.convert(item, f"{name}[{index}]") for index, item in enumerate(value))
        if type(value) is set:
            return {self.convert(item, f"{name}{{...}}") for item in value}
        bases: tuple[Any, ...] = (str, int, float, dict)
        for base in bases:
            if isinstance(value, base):
                return self.convert(base(value), name)
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        plain_types = "numbers, strings, tensors, or dicts and lists of them"
        hint = "its state_dict()" if hasattr(value, "state_dict") else plain_types
        raise CheckpointError(
            f"{name} is of type {kind}, which could only be loaded again by running code; save {hint} instead"
        )

    def mapping(self, value: Any, name: str) -> Any:
        converted: Any = type(value)() if type(value) in (OrderedDict, Counter) else {}
        for key, item in value.items():
            if isinstance(key, torch.Tensor):
                raise CheckpointError(f"{name} has a tensor as a key, which no lookup finds; use a number or a string")
            converted[self.convert(key, f"a key of {name}")] = self.convert(item, f"{name}[{key!r}]")
        if type(value) is OrderedDict and hasattr(value, "_metadata"):
            converted._metadata = self.convert(value._metadata, f"{name}._metadata")
        return converted

    def array(self, value: np.ndarray[Any, Any], name: str) -> torch.Tensor:
        try:
            return torch.from_numpy(np.ascontiguousarray(value)).reshape(value.shape).clone()
        except TypeError as error:
            raise CheckpointError(f"{name} is a NumPy array of {value.dtype}, which torch has no type for") from error

    def tensor(self, value: torch.Tensor, name: str) -> torch.Tensor:
        if hasattr(value, "full_tensor"):
            raise CheckpointError(f"{name} is spread over several ranks; gather it first: tensor.full_tensor()")
        if value.is_meta:
            raise CheckpointError(f"{name} is on the meta device: it has a shape and no values to save")
        value = value.detach()
        if value.layout is not torch.strided or value.is_quantized:
            return value.cpu()
        identity = (value.data_ptr(), value.device, value.shape, value.stride(), value.dtype, value.is_conj())
        if value.numel() == 0 or identity not in self.seen:
            self.sources.append(value)
            self.seen[identity] = _with_own_storage(value)
        return self.seen[identity]


def _with_own_storage(value: torch.Tensor) -> torch.Tensor:
    """Return ``value`` on the CPU in a storage of exactly its size, because a file would hold a view's whole storage."""
    value = value.cpu().resolve_conj().resolve_neg()
    if type(value) is not torch.Tensor:
        value = value.as_subclass(torch.Tensor)
    is_whole = value.untyped_storage().nbytes() == value.nbytes
    return value if is_whole else value.clone(memory_format=torch.contiguous_format)
