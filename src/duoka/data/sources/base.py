"""The interface of batch sources, and what they share: the rank's shard and the seeds of an epoch."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from duoka.data.position import LocalBatch
from duoka.data.stream_fingerprint import StreamFingerprint
from duoka.utils.partition import chunk_bounds
from duoka.utils.rng_state import hash_seed
from duoka.utils.validation import check_integer, invalid_option


@dataclass(frozen=True)
class ShardSpec:
    """The shard of each global batch that one rank has."""

    rank: int
    world_size: int
    batches_per_step: int
    """How many consecutive batches of the user's loader make one global batch."""
    training: bool

    def __post_init__(self) -> None:
        check_integer("world_size", self.world_size, 1)
        check_integer("batches_per_step", self.batches_per_step, 1)
        if not 0 <= self.rank < self.world_size:
            raise invalid_option("rank", self.rank, f"from 0 to {self.world_size - 1}, as world_size={self.world_size}")

    def shard(self, length: int) -> tuple[int, int, int]:
        """Return where this rank's shard of ``length`` samples begins and ends, and how many of them count.

        An empty shard has a filler in training: the first sample, which does not count.
        """
        start, stop = (0, length) if self.world_size == 1 else chunk_bounds(length, self.rank, self.world_size)
        return (0, 1, 0) if start == stop and self.training else (start, stop, stop - start)

    def random_epoch(self, epoch: int) -> int:
        """Return the epoch that random numbers depend on; it is always 0 in evaluation."""
        return epoch if self.training else 0


class BatchSource(ABC):
    """A user's loader as a source of one rank's local batches."""

    fingerprint: StreamFingerprint | None = None
    """The first samples that this rank read of a stream; ``None`` if it loads its own samples only, or none yet."""
    samples: int | None = None
    """The number of samples in an epoch over all ranks; ``None`` if unknown."""

    @abstractmethod
    def epoch(self, seed: int, epoch: int, skip: int) -> Iterator[LocalBatch]:
        """Yield the local batches of ``epoch`` after its first ``skip`` samples; closing it stops worker processes."""

    @abstractmethod
    def __len__(self) -> int: ...

    def close(self) -> None:  # noqa: B027 - most sources have no worker processes
        """Stop persistent worker processes."""


def order_seed(seed: int, epoch: int) -> int:
    """Return the seed of the sample order in ``epoch``."""
    return hash_seed("order", seed, epoch)


def samples_seed(seed: int, epoch: int) -> int:
    """Return the stream that the seeds of the samples in ``epoch`` are derived from."""
    return hash_seed("samples", seed, epoch)
