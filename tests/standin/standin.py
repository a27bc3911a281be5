"""Python side of the stand-in accelerator, a plug-in that torch loads: ``torch.npu`` and a distributed backend.

torch treats it like the plug-in of any accelerator outside its tree; ``npu`` is the name of a real
one. Source: PyTorch's "autoloading out-of-tree extension" and
``torch.utils.rename_privateuse1_backend``.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

NAME = "npu"


def autoload() -> None:
    torch.ops.load_library(str(Path(__file__).with_name("device.so")))
    torch.ops.standin.register_hooks()
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _module())
    torch.utils.generate_methods_for_privateuse1_backend()
    if torch.distributed.is_available():
        torch.distributed.Backend.register_backend("standin", _group, devices=[NAME])


def _module() -> types.ModuleType:
    module = types.ModuleType(f"torch.{NAME}")
    ops = torch.ops.standin
    functions: dict[str, Callable[..., Any]] = {
        "is_available": lambda: ops.device_count() > 0,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "device_count": lambda: ops.device_count(),
        "current_device": lambda: ops.current_device(),
        "set_device": lambda device: ops.set_device(_index(device)),
        "device": lambda device: torch.accelerator.device_index(_index(device)),
        "synchronize": torch.accelerator.synchronize,
        "manual_seed": lambda seed: ops.seed(ops.current_device(), _signed(seed)),
        "manual_seed_all": lambda seed: (
            [ops.seed(index, _signed(seed)) for index in range(ops.device_count())] and None
        ),
        "get_rng_state": lambda device=NAME: ops.get_state(_index(device)),
        "set_rng_state": lambda state, device=NAME: ops.set_state(_index(device), state),
        "get_amp_supported_dtype": lambda: [torch.float16, torch.bfloat16],
        "is_bf16_supported": lambda: True,
        "waits": lambda: ops.waits(),
    }
    vars(module).update(functions)
    return module


def _index(device: Any) -> int:
    index = device if isinstance(device, int) else torch.device(device).index
    return int(torch.ops.standin.current_device()) if index is None else int(index)


def _signed(seed: int) -> int:
    """Return the same 64 bits as a signed number, which operators accept."""
    return (seed + 2**63) % 2**64 - 2**63


def _group(*arguments: Any) -> Any:
    import duoka_standin_group

    return duoka_standin_group.Group(*arguments)
