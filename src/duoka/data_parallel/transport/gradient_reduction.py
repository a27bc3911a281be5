"""Gradient reduction of the collective transport: sums bucket by bucket during the backward."""

from collections.abc import Iterable, Sequence

import torch

from duoka.data_parallel.messages import BackwardRequest
from duoka.data_parallel.tensor_layout import tensor_at
from duoka.data_parallel.transport.base import BackwardTask
from duoka.data_parallel.transport.buckets import Bucket, allocate_bytes
from duoka.data_parallel.transport.process_group import PendingCollective, PrivateProcessGroup


class GradientReduction:
    """Rank 0's part of one backward's transfers, which run while rank 0 computes its own gradients."""

    def __init__(
        self,
        group: PrivateProcessGroup,
        buckets: Sequence[Bucket],
        device: torch.device,
        inputs: dict[int, torch.Tensor],
    ) -> None:
        """Sum the buckets of all workers, and receive each worker's ``inputs``."""
        self._buckets = [(bucket, allocate_bytes(bucket.nbytes, device)) for bucket in buckets]
        self._pending = [group.reduce_sum(base.view(bucket.dtype)) for bucket, base in self._buckets if len(base)]
        self._pending += [group.receive(base, index + 1) for index, base in inputs.items()]

    def wait(self) -> None:
        """Wait for all transfers."""
        for pending in self._pending:
            pending.wait()

    def sums(self, parameters: Iterable[int]) -> dict[int, torch.Tensor]:
        """Return the sums of these parameters' gradients."""
        slots = {n: (base, spec) for bucket, base in self._buckets for n, spec in bucket.specs.items()}
        return {n: tensor_at(*slots[n]) for n in sorted(parameters)}


class CollectiveBackwardTask(BackwardTask):
    """A backward that reduces each bucket as soon as it and all buckets before it are full."""

    def __init__(
        self, request: BackwardRequest, block: torch.Tensor, group: PrivateProcessGroup, buckets: Sequence[Bucket]
    ) -> None:
        super().__init__(request, block)
        self._group = group
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
        if self.request.input_nbytes:
            self._pending.append(self._group.send(self._block[self.request.nbytes :], 0))

    def wait(self) -> None:
        """Wait for all transfers."""
        for pending in self._pending:
            pending.wait()

    def _parameter_slot(self, index: int) -> torch.Tensor | None:
        bucket, spec = self._slots[index]
        return None if bucket < self._num_sent else tensor_at(self._base(bucket), spec)

    def _base(self, bucket: int) -> torch.Tensor:
        base = self._bases[bucket]
        if base is None:
            base = self._bases[bucket] = allocate_bytes(self.request.buckets[bucket][0], self._block.device)
        return base

    def _send_next(self) -> None:
        base = self._base(self._num_sent)
        if len(base):
            self._pending.append(self._group.reduce_sum(base.view(self.request.buckets[self._num_sent][1])))
        self._num_sent += 1
