"""``LocalBatch``, one rank's shard of one global batch, and ``DataPosition``, how far a run has read its data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from duoka.errors import CheckpointError
from duoka.utils.validation import check_integer


class LocalBatch(NamedTuple):
    """One rank's shard of one global batch."""

    batch: Any
    """The rank's samples, collated, shape ``(count, ...)``. If ``count`` is 0: ``None`` in evaluation, and in training a
    filler of one sample, whose loss the caller multiplies by 0."""
    count: int  # type: ignore[assignment]  # not the method of tuples
    """The number of samples of ``batch`` that count."""
    global_count: int
    """The number of samples of all ranks in this step."""


@dataclass(frozen=True)
class DataPosition:
    """The number of samples that a run has taken, from which it can resume on any number of devices."""

    seed: int
    """The seed of the order of all epochs."""
    epoch: int = 0
    """The epoch, from 0."""
    samples: int = 0
    """How many samples of that epoch all ranks together have taken."""

    def __post_init__(self) -> None:
        check_integer("DataPosition.epoch", self.epoch, 0)
        check_integer("DataPosition.samples", self.samples, 0)

    def to_dict(self) -> dict[str, int]:
        """Return the fields as a dict of numbers, for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> DataPosition:
        """Return the position that ``to_dict`` wrote; ``CheckpointError`` if a field is missing."""
        missing = [name for name in ("seed", "epoch", "samples") if name not in state]
        if missing:
            raise CheckpointError(f"the saved data position lacks {', '.join(missing)}; it has {sorted(state)}")
        return cls(int(state["seed"]), int(state["epoch"]), int(state["samples"]))
