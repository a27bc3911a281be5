"""Side effects of a model's forward on the model and on its arguments."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from duoka.data_parallel import scatter_gather


class CallArguments:
    """Copies of a call's arguments, which notice when the call changes them."""

    def __init__(self, skeleton: Any, tensors: Sequence[torch.Tensor]) -> None:
        """Copy a call's tensors, and its other values with a placeholder for each tensor."""
        own = [tensor.detach().clone() for tensor in tensors]
        self._args, self._kwargs = scatter_gather.insert_tensors(copy.deepcopy(skeleton), own)
        self._tensors, skeleton = scatter_gather.extract_tensors((self._args, self._kwargs))
        self._versions = [tensor._version for tensor in self._tensors]
        self._pickled = pickle.dumps(skeleton)

    def apply(self, model: nn.Module) -> Any:
        """Call ``model``."""
        return model(*self._args, **self._kwargs)

    def side_effect(self) -> str:
        """Return what the call changed about its arguments; empty if nothing."""
        if [tensor._version for tensor in self._tensors] != self._versions:
            return "its forward changes its inputs in place"
        if pickle.dumps(scatter_gather.extract_tensors((self._args, self._kwargs))[1]) != self._pickled:
            return "its forward changes an object that it receives"
        return ""


class AttributeState(NamedTuple):
    """Attributes and parameters of a model that its forward may change, by name."""

    tensors: dict[str, list[int]]
    values: dict[str, bytes]
    versions: dict[str, int]

    @classmethod
    def capture(cls, model: nn.Module) -> AttributeState:
        """Return the present state of ``model``."""
        tensors, values = {}, {}
        for prefix, part in model.named_modules():
            for attribute, value in part.__dict__.items():
                if attribute in ("_parameters", "_buffers", "_modules"):
                    continue
                name = f"{prefix}.{attribute}".lstrip(".")
                if isinstance(value, torch.Tensor | list | tuple | dict):
                    tensors[name] = [id(tensor) for tensor in scatter_gather.extract_tensors(value)[0]]
                if isinstance(value, int | float | str | list | tuple | dict | set):
                    with contextlib.suppress(Exception):
                        values[name] = pickle.dumps(scatter_gather.extract_tensors(value)[1])
        return cls(tensors, values, {name: parameter._version for name, parameter in model.named_parameters()})

    def side_effect(self, model: nn.Module) -> str:
        """Return what has changed in ``model`` since the capture; empty if only a call counter has."""
        now = AttributeState.capture(model)
        for name, tensors in now.tensors.items():
            if not set(tensors) <= set(self.tensors.get(name, ())):
                return f"its forward keeps tensors in {name}, which would hold one part of the batch only"
        for name, value in now.values.items():
            if value != self.values.get(name) and not _is_counter(self.values.get(name), value):
                return f"its forward keeps results in {name}, which would be those of one part of the batch"
        written = [name for name, version in now.versions.items() if version != self.versions[name]]
        return f"its forward writes to its parameter {written[0]}" if written else ""


def _is_counter(before: bytes | None, after: bytes) -> bool:
    """Return whether an attribute is an integer that has grown by one."""
    old, new = (None if value is None else pickle.loads(value) for value in (before, after))
    return type(old) is int and type(new) is int and new == old + 1
