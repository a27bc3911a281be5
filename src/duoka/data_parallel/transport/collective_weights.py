"""Copies of parameters and buffers in accelerator workers; rank 0 broadcasts what may have changed.

``docs/design.md`` describes the rules, under "The collective transport": version counters and checksums decide which
buckets rank 0 sends.
"""

from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from typing import Any

import torch

from duoka.data_parallel.messages import Notification, ReceiveWeights
from duoka.data_parallel.model_diff import ModelSnapshot
from duoka.data_parallel.tensor_layout import Location
from duoka.data_parallel.transport.base import GradientLayout, WeightSync
from duoka.data_parallel.transport.buckets import Bucket, BucketChecksum, gradient_buckets, pack_bucket, value_buckets
from duoka.data_parallel.transport.process_group import PendingCollective, PrivateProcessGroup
from duoka.errors import DeviceError


class CollectiveWeightSync(WeightSync):
    """Tracks which buckets of one model workers have, and broadcasts the others."""

    def __init__(
        self,
        post: Callable[[Notification], None],
        process_group: PrivateProcessGroup,
        device: torch.device,
        model: int,
        snapshot: ModelSnapshot,
    ) -> None:
        super().__init__(snapshot)
        self._post, self._process_group, self._device, self._model = post, process_group, device, model
        self._check_devices()
        self._lay_out()
        self._versions: list[list[Any]] = [[] for _ in self._buckets]
        self._checksums: list[torch.Tensor | None] = [None] * len(self._buckets)
        """Checksum of the values that workers have; ``None`` where unknown."""
        self._pending: list[PendingCollective] = []
        self._classify_buckets()

    def _lay_out(self) -> None:
        """Assign trained parameters, frozen parameters and buffers to buckets of their own."""
        tensors = self.snapshot.tensors()
        count = len(self.parameters)
        trained = [n for n, parameter in enumerate(self.parameters) if parameter.requires_grad]
        frozen = [n for n, parameter in enumerate(self.parameters) if not parameter.requires_grad]
        self._buckets: list[Bucket] = value_buckets(tensors, [trained, frozen, range(count, len(tensors))])
        placements = {
            n: (Location(b, 0), spec) for b, bucket in enumerate(self._buckets) for n, spec in bucket.specs.items()
        }
        self.placements = tuple(placements[n] for n in range(count))
        rest = iter(range(count, len(tensors)))
        self.buffer_placements = tuple(
            None if buffer is None else placements[next(rest)] for buffer in self.snapshot.buffers()
        )
        self.bucket_nbytes = tuple(bucket.nbytes for bucket in self._buckets)

    def detect_changes(self) -> list[int]:
        """Return the indices of parameters with another ``requires_grad``, shape or dtype."""
        self._check_devices()
        changed = [
            index
            for index, parameter in enumerate(self.parameters)
            if parameter.requires_grad != self._requires_grad[index] or not self.shapes_unchanged([index])
        ]
        if changed:
            self._classify_buckets()
        return changed

    def push(self, *, training: bool) -> None:
        """Broadcast what may have changed."""
        tensors = self.snapshot.tensors()
        versions = self._current_versions(tensors)
        always = self._volatile if training else set()
        stale = {
            n
            for n, checksum in enumerate(self._checksums)
            if n in always or checksum is None or versions[n] != self._versions[n]
        }
        stale |= self._find_edited([n for n in range(len(versions)) if n not in stale], tensors)
        self._pending = self._broadcast(sorted(stale), tensors, unchecked=always)

    def acknowledge(self) -> None:
        """Free the memory of broadcasts: between steps, only the model itself uses memory."""
        pending, self._pending = self._pending, []
        for broadcast in pending:
            broadcast.wait()

    def invalidate(self) -> None:
        """Broadcast every bucket again: a failed call may have written to the workers' copies."""
        self._checksums = [None] * len(self._buckets)

    def _current_versions(self, tensors: Sequence[torch.Tensor]) -> list[list[Any]]:
        """Return address and version counter of each given tensor, by bucket."""
        return [[_version(tensors[n]) for n in bucket.specs if n < len(tensors)] for bucket in self._buckets]

    def _broadcast(
        self, buckets: Sequence[int], tensors: Sequence[torch.Tensor], unchecked: Collection[int]
    ) -> list[PendingCollective]:
        """Broadcast these buckets; compute checksums of all that are not ``unchecked``."""
        stale = [n for n in buckets if self._buckets[n].nbytes]
        if not stale:
            return []
        pending = []
        self._post(ReceiveWeights(self._model, tuple(stale)))
        for n in stale:
            base = pack_bucket(self._buckets[n], tensors, self._device)
            pending.append(self._process_group.broadcast(base))
            self._versions[n] = [_version(tensors[index]) for index in self._buckets[n].specs]
            self._checksums[n] = None if n in unchecked else self._checksum(base)
        return pending

    def _find_edited(self, buckets: Sequence[int], tensors: Sequence[torch.Tensor]) -> set[int]:
        """Return the buckets whose checksum differs; the host waits for its device here."""
        known = [checksum for n in buckets if (checksum := self._checksums[n]) is not None]
        if not known:
            return set()
        current = [self._checksum(pack_bucket(self._buckets[n], tensors, self._device)) for n in buckets]
        differs = (torch.stack(current) != torch.stack(known)).tolist()
        return {n for n, is_edited in zip(buckets, differs, strict=True) if is_edited}

    @cached_property
    def _checksum(self) -> BucketChecksum:
        return BucketChecksum(self._device)

    def _classify_buckets(self) -> None:
        """Find the buckets of trained parameters, and the volatile ones: these, and those of buffers."""
        self._requires_grad = [parameter.requires_grad for parameter in self.parameters]
        count = len(self.parameters)
        trained = {n for n in range(count) if self._requires_grad[n]}
        self._trained = [b for b, bucket in enumerate(self._buckets) if trained & bucket.specs.keys()]
        self._volatile = {
            b for b, bucket in enumerate(self._buckets) if b in self._trained or max(bucket.specs) >= count
        }
        self.gradient_layout = GradientLayout(buckets=gradient_buckets(self.parameters))

    def _check_devices(self) -> None:
        for parameter in self.parameters:
            if parameter.device != self._device:
                raise DeviceError(
                    f"a parameter of shape {tuple(parameter.shape)} is on {parameter.device}, but the first device of "
                    f"duoka.DataParallel is {self._device}. Move the model there: model.to({str(self._device)!r})"
                )


def _version(tensor: torch.Tensor) -> tuple[int, int]:
    """Return what changes with most edits; a tensor of inference mode has no version counter."""
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version
