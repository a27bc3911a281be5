"""Backend of the stand-in accelerator for torch.distributed: tensors pass through host memory, over gloo."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _create_work_from_future

TIMEOUT = datetime.timedelta(minutes=2)
"""Of every operation: launch changes a group's timeout after the rendezvous, which does not reach gloo here."""


class Group(dist.ProcessGroup):
    """The operations that DistributedDataParallel and duoka's ``World`` use; each is complete when it returns."""

    def __init__(self, store: Any, rank: int, size: int, _: Any) -> None:
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout=TIMEOUT)

    def allreduce(self, tensors: Sequence[torch.Tensor], options: Any = None) -> Any:
        return _on_host(tensors, lambda hosts: self._gloo.allreduce(hosts, options or dist.AllreduceOptions()))

    def allreduce_coalesced(self, tensors: Sequence[torch.Tensor], options: Any = None) -> Any:
        for tensor in tensors:
            self.allreduce([tensor], options)
        return _done(tensors)

    def broadcast(self, tensors: Sequence[torch.Tensor], options: Any) -> Any:
        return _on_host(tensors, lambda hosts: self._gloo.broadcast(hosts, options))

    def reduce(self, tensors: Sequence[torch.Tensor], options: Any) -> Any:
        return _on_host(tensors, lambda hosts: self._gloo.reduce(hosts, options))

    def allgather(self, outputs: Any, inputs: Sequence[torch.Tensor], options: Any = None) -> Any:
        def gather(hosts: list[torch.Tensor]) -> Any:
            rest = iter(hosts)
            lists = [[next(rest) for _ in part] for part in outputs]
            return self._gloo.allgather(lists, [tensor.cpu() for tensor in inputs], options or dist.AllgatherOptions())

        return _on_host([tensor for part in outputs for tensor in part], gather)

    def _allgather_base(self, output: torch.Tensor, given: torch.Tensor, options: Any = None) -> Any:
        return self.allgather([list(output.chunk(self.size()))], [given], options)

    all_gather_single = _allgather_base  # its name in torch 2.14

    def barrier(self, _: Any = None) -> Any:
        return self.allreduce([torch.zeros(1)])

    def getBackendName(self) -> str:
        return "standin"


def _on_host(tensors: Sequence[torch.Tensor], start: Callable[[list[torch.Tensor]], Any]) -> Any:
    hosts = [tensor.cpu() for tensor in tensors]
    start(hosts).wait()
    for tensor, host in zip(tensors, hosts, strict=True):
        tensor.copy_(host)
    return _done(tensors)


def _done(tensors: Sequence[torch.Tensor]) -> Any:
    future: torch.futures.Future[Any] = torch.futures.Future()
    future.set_result(list(tensors))
    return _create_work_from_future(future)
