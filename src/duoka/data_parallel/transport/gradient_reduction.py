"""Gradient reduction of the collective transport: sums bucket by bucket during the backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from duoka.data_parallel import tensor_layout as layout
from duoka.data_parallel.messages import BackwardRequest, BackwardResult
from duoka.data_parallel.tensor_layout import Allocation, Location
from duoka.data_parallel.transport.base import BackwardContext, BackwardTask, GradientExchange, GroupChannel
from duoka.data_parallel.transport.buckets import Bucket, allocate_bytes
from duoka.data_parallel.transport.process_group import PendingCollective, PrivateProcessGroup

NOWHERE = Location(0, 0)
"""Location in messages whose tensors are sent."""


class CollectiveGradientExchange(GradientExchange):
    """A backward on workers, whose gradients are reduced while rank 0 computes its own."""

    def __init__(self, group: GroupChannel, process_group: PrivateProcessGroup, context: BackwardContext) -> None:
        super().__init__(group, context)
        device = group.devices[0]
        self._buckets: list[Bucket] = context.gradient_layout
        buckets = tuple((bucket.nbytes, bucket.dtype) for bucket in self._buckets)
        for index in range(process_group.size - 1):
            given = context.gradients[index] if index < len(context.gradients) else ()
            is_used = any(gradient is not None for gradient in given)
            inputs, input_nbytes = layout.repack_layout(context.inputs[index] if is_used else [])
            self._inputs[index] = allocate_bytes(input_nbytes, device), inputs
            if is_used or buckets:
                outputs, size = layout.pack_present(given)
                allocation = Allocation(NOWHERE, allocate_bytes(size, device))
                layout.copy_to_layout(allocation.base, outputs, given)
                self._request(index, allocation, outputs, buckets, input_nbytes)
        self._sums = [allocate_bytes(bucket.nbytes, device) for bucket in self._buckets]
        self._pending = [
            process_group.reduce_sum(base.view(bucket.dtype))
            for base, bucket in zip(self._sums, self._buckets, strict=True)
            if len(base)
        ]
        for index, (base, _) in self._inputs.items():
            if len(base):
                self._pending.append(process_group.receive(base, index + 1))

    def _sum_parameters(self, results: Sequence[BackwardResult]) -> dict[int, torch.Tensor]:
        """Wait for the sums, which have arrived or soon will."""
        with self._group.stop_on_error():
            self._wait_transfers()
        slots = {
            n: (base, spec)
            for base, bucket in zip(self._sums, self._buckets, strict=True)
            for n, spec in bucket.specs.items()
        }
        return {n: layout.tensor_at(*slots[n]) for n in sorted({n for result in results for n in result.parameters})}

    def discard(self) -> None:
        """Keep the memory of transfers under way until they are complete."""
        replies = iter(range(len(self._requests) - 1, -1, -1))

        def wait_after_last() -> None:
            if next(replies) == 0:
                self._wait_transfers()

        for index, call_id in self._requests:
            self._group.discard_result(index, call_id, wait_after_last)

    def _wait_transfers(self) -> None:
        for pending in self._pending:
            pending.wait()


class CollectiveBackwardTask(BackwardTask):
    """A backward that reduces each bucket as soon as it and all buckets before it are full."""

    def __init__(
        self, request: BackwardRequest, block: torch.Tensor, group: PrivateProcessGroup, buckets: Sequence[Bucket]
    ) -> None:
        super().__init__(request, block, allocate_bytes(request.input_nbytes, block.device))
        self._group, self._device = group, block.device
        self._bases: list[torch.Tensor | None] = [None] * len(request.buckets)
        self._missing = [set(bucket.specs) for bucket in buckets]
        self._slots = {n: (b, spec) for b, bucket in enumerate(buckets) for n, spec in bucket.specs.items()}
        self._num_sent = 0
        self._pending: list[PendingCollective] = []

    def accept_gradient(self, index: int, gradient: torch.Tensor) -> None:
        """Take one parameter's gradient, and reduce the buckets that are full."""
        super().accept_gradient(index, gradient)
        self._missing[self._slots[index][0]].discard(index)
        while self._num_sent < len(self._missing) and not self._missing[self._num_sent]:
            self._send_next()

    def finish(self) -> None:
        """Send what remains, zeros where no gradient came: the other ranks wait for it."""
        while self._num_sent < len(self._bases):
            self._send_next()
        if len(self._input_block):
            self._pending.append(self._group.send(self._input_block, 0))

    def wait(self) -> None:
        """Wait for all transfers."""
        for pending in self._pending:
            pending.wait()

    def _parameter_slot(self, index: int) -> torch.Tensor | None:
        bucket, spec = self._slots[index]
        return None if bucket < self._num_sent else layout.tensor_at(self._base(bucket), spec)

    def _base(self, bucket: int) -> torch.Tensor:
        base = self._bases[bucket]
        if base is None:
            base = self._bases[bucket] = allocate_bytes(self.request.buckets[bucket][0], self._device)
        return base

    def _send_next(self) -> None:
        base = self._base(self._num_sent)
        if len(base):
            self._pending.append(self._group.reduce_sum(base.view(self.request.buckets[self._num_sent][1])))
        self._num_sent += 1
