"""What every kind of source of parts has in common: the spec a rank has, and what a source promises."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from duoka.data.position import LocalBatch, part_bounds
from duoka.data.rng import hash_seed
from duoka.data.stream_fingerprint import StreamFingerprint
from duoka.errors import ConfigError

__all__ = ["ShardSpec", "BatchSource", "order_seed", "samples_seed", "stop_workers"]


@dataclass(frozen=True)
class ShardSpec:
    """Which part of which global batches one rank has."""

    rank: int
    world_size: int
    batches_per_step: int
    """How many consecutive batches of the user's loader make one global batch."""
    training: bool

    def __post_init__(self) -> None:
        if self.world_size < 1 or not 0 <= self.rank < self.world_size:
            raise ConfigError(
                f"rank={self.rank} with world_size={self.world_size} is not valid: ranks are 0 to world_size - 1"
            )
        if self.batches_per_step < 1:
            raise ConfigError(f"batches_per_step={self.batches_per_step} is not valid: it must be 1 or more")

    def bounds(self, length: int) -> tuple[int, int]:
        """Return where this rank's part of ``length`` samples begins and ends; both are equal where it has none."""
        return (0, length) if self.world_size == 1 else part_bounds(length, self.rank, self.world_size)

    def epoch(self, epoch: int) -> int:
        """Return what randomness is drawn from for ``epoch``: evaluation is the same every time."""
        return epoch if self.training else 0


class BatchSource(Protocol):
    """A user's loader, seen as parts."""

    @property
    def fingerprint(self) -> StreamFingerprint | None:
        """What this rank has read first in the epoch; ``None`` where a rank reads its own samples only, or none so far."""
        ...

    @property
    def samples(self) -> int | None:
        """How many samples an epoch has over all ranks, where that is known."""
        ...

    def epoch(self, seed: int, epoch: int, skip: int) -> Iterator[LocalBatch]:
        """Yield this rank's parts of ``epoch`` without the first ``skip`` samples; ends its workers when it is closed."""
        ...

    def __len__(self) -> int: ...

    def close(self) -> None:
        """End worker processes that were kept."""
        ...


def order_seed(seed: int, epoch: int) -> int:
    """Return the seed that the order of ``epoch`` is drawn from."""
    return hash_seed("order", seed, epoch)


def samples_seed(seed: int, epoch: int) -> int:
    """Return the stream that seeds the samples of ``epoch``."""
    return hash_seed("samples", seed, epoch)


def stop_workers(iterator: Any) -> None:
    """End the worker processes of a DataLoader's iterator now, not when it is collected; does nothing for others."""
    if callable(shutdown := getattr(iterator, "_shutdown_workers", None)):
        shutdown()
