"""What a checkpoint may hold: numbers, text, tensors, and dicts, lists and tuples of them; nothing that is code."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from duoka.errors import CheckpointError

__all__ = ["portable", "tensor_bytes"]

_AS_THEY_ARE = (type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device)
_SUBCLASSES: tuple[tuple[type, Callable[[Any], Any]], ...] = ((str, str), (int, int), (float, float), (dict, dict))


def portable(state: Any, name: str = "state") -> Any:
    """Return ``state`` as it is written: tensors on the CPU, NumPy's as torch's and Python's, other types kept.

    Raises:
        CheckpointError: something in it is of a type that could only be loaded by running code; the message says where.

    """
    return _Converter().convert(state, name)


def tensor_bytes(state: Any) -> int:
    """How many bytes the tensors in a portable ``state`` take, one that occurs twice counted once."""
    return sum({id(tensor): tensor.numel() * tensor.element_size() for tensor in _tensors(state)}.values())


def _tensors(state: Any) -> Iterator[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, Mapping):
        for value in state.values():
            yield from _tensors(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _tensors(value)


class _Converter:
    """Converts one state; what is the same tensor in it stays the same tensor."""

    def __init__(self) -> None:
        self.seen: dict[tuple[Any, ...], torch.Tensor] = {}
        self.sources: list[torch.Tensor] = []  # kept alive, so that no address in `seen` is used twice

    def convert(self, value: Any, name: str) -> Any:
        if type(value) in _AS_THEY_ARE:
            return value
        if isinstance(value, torch.Tensor):
            return self.tensor(value, name)
        if isinstance(value, np.ndarray | np.generic):
            return self.numpy(value, name)
        if type(value) in (dict, OrderedDict, Counter, defaultdict):
            return self.mapping(value, name)
        if type(value) in (list, tuple):
            return type(value)(self.convert(item, f"{name}[{index}]") for index, item in enumerate(value))
        if type(value) is set:
            return {self.convert(item, f"{name}{{...}}") for item in value}
        for base, plain in _SUBCLASSES:
            if isinstance(value, base):
                return self.convert(plain(value), name)
        raise _refused(value, name)

    def mapping(self, value: Any, name: str) -> Any:
        pairs = ((self.key(key, name), self.convert(item, f"{name}[{key!r}]")) for key, item in value.items())
        if type(value) is Counter:
            return Counter(dict(pairs))
        kind = OrderedDict if type(value) is OrderedDict else dict
        converted: dict[Any, Any] = kind(pairs)
        if isinstance(converted, OrderedDict) and hasattr(value, "_metadata"):
            converted._metadata = self.convert(value._metadata, f"{name}._metadata")  # type: ignore[attr-defined]
        return converted

    def key(self, key: Any, name: str) -> Any:
        if isinstance(key, torch.Tensor):
            raise CheckpointError(f"{name} has a tensor as a key, which is not found again; use a number or a string")
        return self.convert(key, f"a key of {name}")

    def numpy(self, value: np.ndarray[Any, Any] | np.generic, name: str) -> Any:
        if isinstance(value, np.generic):
            return self.convert(value.item(), name)
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
            self.seen[identity] = _own_storage(value)
        return self.seen[identity]


def _own_storage(value: torch.Tensor) -> torch.Tensor:
    """``value`` on the CPU in a storage of just its size: a view would be written with all that it is a view of."""
    value = value.cpu().resolve_conj().resolve_neg()
    if type(value) is not torch.Tensor:
        value = value.as_subclass(torch.Tensor)
    whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
    return value if whole else value.clone(memory_format=torch.contiguous_format)


def _refused(value: Any, name: str) -> CheckpointError:
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    hint = (
        "its state_dict()" if hasattr(value, "state_dict") else "numbers, strings, tensors, or dicts and lists of them"
    )
    return CheckpointError(
        f"{name} is of type {kind}, which could only be loaded again by running code; save {hint} instead"
    )
