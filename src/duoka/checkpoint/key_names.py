"""Parameter names without wrappers' parts: ``module.`` of DataParallel and DDP, ``_orig_mod.`` of torch.compile."""

import itertools
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

COMPILED = "_orig_mod"
WRAPPED = "module"


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's own module from any nesting of DataParallel, DistributedDataParallel and ``torch.compile``.

    A user's module with a child named ``module`` is no wrapper, and is returned unchanged.

    >>> model = nn.Linear(2, 3)
    >>> unwrap(nn.DataParallel(model)) is model
    True
    """
    while (inner := _inner_name(model)) is not None:
        model = model._modules[inner]  # type: ignore[assignment]  # a wrapper always holds what it wraps
    return model


def _inner_name(module: nn.Module) -> str | None:
    """Return the name of the wrapped module in a wrapper; ``None`` for a module that is no wrapper."""
    compiler = sys.modules.get("torch._dynamo.eval_frame")  # slow to import, and loaded if anything is compiled
    if compiler is not None and isinstance(module, compiler.OptimizedModule):
        return COMPILED
    return WRAPPED if isinstance(module, (DataParallel, DistributedDataParallel)) else None


def clean_name(model: nn.Module, name: str) -> str:
    """Return ``name``, a key of ``model``'s state dict, without the parts that wrappers inside ``model`` added."""
    kept: list[str] = []
    module: nn.Module | None = model
    for part in name.split("."):
        if module is None or _inner_name(module) != part:
            kept.append(part)
        module = module._modules.get(part) if module is not None else None
    return ".".join(kept)


def clean_state(state: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """Return ``state`` without wrappers' prefixes, as far as names alone tell.

    Without the model, a child that the user named ``module`` looks like a wrapper. So ``module.`` is removed only if
    every key begins with it; ``_orig_mod`` is removed anywhere.
    """
    if not state or not all(isinstance(key, str) for key in state):
        return state
    parts = zip(*map(_without_compiled, state), strict=False)  # all first parts, all second parts, ...
    depth = sum(1 for _ in itertools.takewhile(lambda names: set(names) == {WRAPPED}, parts))
    cleaned = rename_keys(state, lambda key: ".".join(_without_compiled(key)[depth:]))
    is_clear = "" not in cleaned and len(cleaned) == len(state)
    return cleaned if is_clear and list(cleaned) != list(state) else state


def rename_keys(state: Mapping[Any, Any], rename: Callable[[str], str]) -> OrderedDict[str, Any]:
    """Return ``state`` by other names, and the modules' versions in it, which some modules need to load."""
    renamed = OrderedDict((rename(key), value) for key, value in state.items())
    if hasattr(state, "_metadata"):
        renamed._metadata = {rename(key): value for key, value in state._metadata.items()}  # type: ignore[attr-defined]
    return renamed


def _without_compiled(name: str) -> list[str]:
    return [part for part in name.split(".") if part != COMPILED]


def match_names(found: Iterable[str], wanted: Iterable[str]) -> dict[str, str]:
    """Return the model's name (from ``wanted``) for each name of a file (``found``), ignoring wrappers' parts.

    Equal names match. Names that differ only by ``module`` and ``_orig_mod`` parts match if that is unambiguous, so a
    child that the user named ``module`` keeps its name.
    """
    found, wanted = list(found), list(wanted)
    if set(found) == set(wanted):
        return {name: name for name in found}
    files, models = _by_core(found), _by_core(wanted)
    matched: dict[str, str] = {}
    for core, names in files.items():
        targets = models.get(core, [])
        if len(names) == len(targets):  # a wrapper adds its part to all names, which keeps their order by depth
            matched.update(zip(names, targets, strict=True))
        else:
            matched.update({name: name for name in names if name in targets})
    return matched


def _by_core(names: list[str]) -> dict[str, list[str]]:
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for name in sorted(names, key=lambda name: name.count(".")):
        groups[".".join(part for part in name.split(".") if part not in (COMPILED, WRAPPED))].append(name)
    return groups
