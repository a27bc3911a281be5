"""The Python side of the stand-in accelerator, which torch loads by itself: ``torch.npu``, and a backend for its groups.

torch calls it as it calls the plug-in of any accelerator that it does not know itself; ``npu`` is the name that such a one
has in fact. Source: PyTorch's "autoloading out-of-tree extension" and ``torch.utils.rename_privateuse1_backend``.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
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
        "synchronize": torch.accelerator.synchronize,
        "manual_seed": lambda seed: ops.seed(ops.current_device(), _signed(seed)),
        "manual_seed_all": lambda seed: [ops.seed(index, _signed(seed)) for index in range(ops.device_count())] and None,
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
    """The same 64 bits as a number that an operator takes."""
    return (seed + 2**63) % 2**64 - 2**63


def _group(store: Any, rank: int, size: int, timeout: Any) -> Any:
    """Return a group whose tensors go through the host's memory, over gloo."""
    import torch.distributed as dist
    from torch._C._distributed_c10d import _create_work_from_future

    def done(value: Any) -> Any:
        future: torch.futures.Future[Any] = torch.futures.Future()
        future.set_result(value)
        return _create_work_from_future(future)

    class Group(dist.ProcessGroup):
        def __init__(self) -> None:
            super().__init__(rank, size)
            self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout=timeout)

        def allreduce(self, tensors: Sequence[torch.Tensor], options: Any = None) -> Any:
            return self._through(tensors, lambda hosts: self._gloo.allreduce(hosts, options or dist.AllreduceOptions()))

        def allreduce_coalesced(self, tensors: Sequence[torch.Tensor], options: Any = None) -> Any:
            for tensor in tensors:
                self.allreduce([tensor], options)
            return done(list(tensors))

        def broadcast(self, tensors: Sequence[torch.Tensor], options: Any) -> Any:
            return self._through(tensors, lambda hosts: self._gloo.broadcast(hosts, options))

        def reduce(self, tensors: Sequence[torch.Tensor], options: Any) -> Any:
            return self._through(tensors, lambda hosts: self._gloo.reduce(hosts, options))

        def allgather(self, outputs: Any, inputs: Sequence[torch.Tensor], options: Any = None) -> Any:
            flat = [tensor for part in outputs for tensor in part]
            hosts = [[tensor.cpu() for tensor in part] for part in outputs]
            self._gloo.allgather(hosts, [tensor.cpu() for tensor in inputs], options or dist.AllgatherOptions()).wait()
            for tensor, host in zip(flat, [host for part in hosts for host in part], strict=True):
                tensor.copy_(host)
            return done(outputs)

        def _allgather_base(self, output: torch.Tensor, given: torch.Tensor, options: Any = None) -> Any:
            return self.allgather([list(output.chunk(size))], [given], options)

        all_gather_single = _allgather_base  # as torch 2.14 calls it

        def barrier(self, _: Any = None) -> Any:
            return self.allreduce([torch.zeros(1)])

        def getBackendName(self) -> str:
            return "standin"

        def _through(self, tensors: Sequence[torch.Tensor], start: Callable[[list[torch.Tensor]], Any]) -> Any:
            hosts = [tensor.cpu() for tensor in tensors]
            start(hosts).wait()
            for tensor, host in zip(tensors, hosts, strict=True):
                tensor.copy_(host)
            return done(list(tensors))

    return Group()
