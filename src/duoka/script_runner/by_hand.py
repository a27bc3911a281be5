"""``nn.DataParallel``'s steps as a script calls them by hand in a rehearsal: replicate, scatter, parallel_apply, gather.

torch's own need CUDA in what they do last; here that is done on the CPU, in the order of the devices. So such a branch can
be rehearsed; nothing of it is computed at the same time.
Source: ``torch.nn.parallel``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from duoka.script_runner.patching import Patches

__all__ = ["enter"]


def enter(patches: Patches) -> None:
    """Let the steps work on CPU tensors for as long as ``patches`` hold."""
    steps = sys.modules["torch.nn.parallel.scatter_gather"]
    patches.set(steps, "Scatter", SimpleNamespace(apply=_scatter))
    patches.set(steps, "Gather", SimpleNamespace(apply=_gather))
    patches.set(sys.modules["torch.nn.parallel._functions"], "Broadcast", SimpleNamespace(apply=_broadcast))
    patches.set(sys.modules["torch.nn.parallel.comm"], "broadcast_coalesced", _copies)
    for owner in ("torch.nn.parallel", "torch.nn.parallel.parallel_apply", "torch.nn.parallel.data_parallel"):
        patches.set(sys.modules[owner], "parallel_apply", _parallel_apply)


def _scatter(devices: Sequence[Any], _: Any, dim: int, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tensor.chunk(len(devices), dim)


def _gather(_: Any, dim: int, *outputs: torch.Tensor) -> torch.Tensor:
    return torch.stack(outputs) if outputs[0].dim() == 0 else torch.cat(outputs, dim)


def _broadcast(devices: Sequence[Any], *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Parameters of replicas are no leaves: their gradients come back to the model's own."""
    return tuple(tensor.view_as(tensor) for _ in devices for tensor in tensors)


def _copies(tensors: Sequence[torch.Tensor], devices: Sequence[Any], *_: Any) -> list[list[torch.Tensor]]:
    """The first replica's buffers are the model's own, so that what it writes to them stays."""
    return [list(tensors), *([tensor.detach().clone() for tensor in tensors] for _ in devices[1:])]


def _parallel_apply(
    modules: Sequence[nn.Module], inputs: Sequence[Any], kwargs_tup: Sequence[Any] | None = None, _: Any = None
) -> list[Any]:
    given = [value if isinstance(value, list | tuple) else (value,) for value in inputs]
    options = [kwargs or {} for kwargs in kwargs_tup or [None] * len(given)]
    return [module(*args, **kwargs) for module, args, kwargs in zip(modules, given, options, strict=True)]
