"""Copy of a model for a check: structure and buffers are copied, parameters share memory with the model."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from duoka.data_parallel.gather import is_close
from duoka.data_parallel.model_diff import REGISTRIES, parameters_of
from duoka.data_parallel.module_copy import ModuleCopies
from duoka.data_parallel.placeholders import is_dense
from duoka.data_parallel.state_watch import Digest

_OF_TORCH = frozenset(vars(nn.Module()))
_ATOMS = (int, float, complex, str, bytes, bool, type(None))
_OPAQUE = (type, ModuleType, FunctionType, MethodType, nn.Module, torch.Generator, np.ndarray)


class ModelCopies:
    """Makes copies of a model that share ``leaves``: what has gradients."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        known = {id(one) for one in (*module.modules(), *parameters_of(module), *module.buffers())}
        attributes = [v for m in module.modules() for name, v in m.__dict__.items() if name not in REGISTRIES]
        found = Digest(attributes, frozenset(known))
        self.generators = found.generators
        self.names: list[str] = []
        self.leaves: list[torch.Tensor] = []
        self.parameters: dict[str, torch.Tensor] = {}
        kept = [*found.generators, *(value for value in attributes if isinstance(value, torch.jit.ScriptFunction))]
        self._memo: dict[int, Any] = {id(value): value for value in kept}
        """What copies share with the model, by the id of the model's."""
        buffers = [(f"buffer {name}", buffer) for name, buffer in module.named_buffers() if buffer.requires_grad]
        hidden = [("a tensor in an attribute", tensor) for tensor in found.tensors]
        for name, tensor in (*module.named_parameters(), *buffers, *hidden):
            self._alias(name, tensor)

    def new(self, device: torch.device | None = None) -> nn.Module:
        """Return a copy of the model as it is now, without the script's hooks."""
        model: nn.Module = ModuleCopies(self._module, self._memo).make()
        for part in model.modules():
            for registry in (part._forward_hooks, part._forward_pre_hooks):
                for key in [key for key, hook in registry.items() if is_script_hook(hook)]:
                    del registry[key]
        return model if device is None else model.to(device)

    def _alias(self, name: str, tensor: torch.Tensor) -> None:
        if id(tensor) in self._memo or not is_dense(tensor):
            return
        if tensor.grad_fn is not None:  # a result of an earlier call
            self._memo[id(tensor)] = tensor.detach().clone()
            return
        alias: torch.Tensor = tensor.detach()
        if isinstance(tensor, nn.Parameter):
            alias = nn.Parameter(alias, tensor.requires_grad)
            alias.__dict__.update(tensor.__dict__)
        alias.requires_grad_(tensor.requires_grad)
        self.parameters[f"{name} ({len(self.parameters)})" if name in self.parameters else name] = alias
        self._memo[id(tensor)] = alias
        if alias.requires_grad:
            self.names.append(name)
            self.leaves.append(alias)


class WriteGuard(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes writes to tensors, and undoes them at the end."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tensors: dict[int, list[tuple[str, torch.Tensor]]] = {}
        for name, tensor in tensors.items():
            if tensor.numel():
                self._tensors.setdefault(tensor.untyped_storage().data_ptr(), []).append((name, tensor))
        self._saved: dict[int, list[torch.Tensor]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator; keep what it would overwrite."""
        kwargs = kwargs or {}
        schema = function._schema
        if schema.is_mutable:
            values = (*args, *(kwargs.get(argument.name) for argument in schema.arguments[len(args) :]))
            for argument, value in zip(schema.arguments, values, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    for one in value if isinstance(value, list | tuple) else [value]:
                        self._keep(one)
        return function(*args, **kwargs)

    def undo(self) -> dict[str, torch.Tensor]:
        """Restore what was overwritten, and return what had been written."""
        written = {}
        with torch.no_grad():
            for address, saved in self._saved.items():
                for (name, tensor), before in zip(self._tensors[address], saved, strict=True):
                    if not torch.equal(tensor, before):
                        written[name] = tensor.detach().clone()
                        tensor.detach().copy_(before)
        self._saved.clear()
        return written

    def _keep(self, tensor: Any) -> None:
        if not isinstance(tensor, torch.Tensor) or not is_dense(tensor):
            return
        address = tensor.untyped_storage().data_ptr()
        if address in self._tensors and address not in self._saved:
            self._saved[address] = [tensor.detach().clone() for _, tensor in self._tensors[address]]


def attributes_of(model: nn.Module) -> dict[str, list[Any]]:
    """Return what a forward may leave in the attributes of a model: by name, tensors, numbers and texts at any depth."""
    found: dict[str, list[Any]] = {}
    seen: dict[int, Any] = {}
    for prefix, part in model.named_modules():
        for attribute, value in part.__dict__.items():
            if attribute not in _OF_TORCH and not attribute.startswith("_duoka_"):
                found[f"{prefix}.{attribute}".lstrip(".")] = list(_leaves(value, seen))
    return found


def _leaves(value: Any, seen: dict[int, Any]) -> Iterator[Any]:
    """Yield the content of a value; that of an object once."""
    if isinstance(value, (torch.Tensor, *_ATOMS)):
        yield value
        return
    if isinstance(value, _OPAQUE) or id(value) in seen:
        return
    seen[id(value)] = value  # alive, so that ids stay unique
    children: Iterable[Any]
    if isinstance(value, Mapping):
        children = chain(value, value.values())
    elif isinstance(value, list | tuple | deque):
        children = value
    elif isinstance(value, set | frozenset):
        children = sorted(repr(item) for item in value if isinstance(item, _ATOMS))  # others differ in each copy
    else:
        children = list(getattr(value, "__dict__", {}).values())
    yield type(value).__name__
    for child in children:
        yield from _leaves(child, seen)


def changed_attribute(whole: dict[str, list[Any]], part: dict[str, list[Any]]) -> str:
    """Return what differs after a forward of the whole batch and of a part; empty if nothing does."""
    for name in whole.keys() | part.keys():
        one, other = whole.get(name, []), part.get(name, [])
        if len(one) == len(other) and all(map(_is_same, one, other)):
            continue
        if any(isinstance(leaf, torch.Tensor) for leaf in (*one, *other)):
            return f"its forward keeps tensors in {name}, which would hold one part of the batch only"
        return f"its forward keeps results in {name}, which would be those of one part of the batch"
    return ""


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return is_close(one, other)
    return type(one) is type(other) and (one == other or (one != one and other != other))


def module_with_script_hook(model: nn.Module) -> str | None:
    """Return the name of the first module that has a hook of the script."""
    name: str
    for name, part in model.named_modules():
        registries = (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks)
        if any(is_script_hook(hook) for registry in registries for hook in registry.values()):
            return name
    return None


def is_script_hook(hook: Callable[..., Any]) -> bool:
    """Return whether a hook is defined outside torch and transformers, whose hooks know that a model may be replicated."""
    function = getattr(hook, "__wrapped__", hook)
    module = getattr(function, "__module__", None) or type(function).__module__
    return str(module).split(".")[0] not in ("torch", "transformers")
