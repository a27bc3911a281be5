"""Where a run is in its data, and which part of a global batch a rank has: small values without behaviour of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from duoka.errors import CheckpointError, ConfigError

__all__ = ["LocalBatch", "DataPosition", "part_bounds"]


class LocalBatch(NamedTuple):
    """One rank's part of one global batch."""

    batch: Any
    """The rank's samples, collated, shape ``(count, ...)``. Where ``count`` is 0: in training a filler of one sample that
    the caller weights with 0, in evaluation ``None``."""
    count: int  # type: ignore[assignment]  # not the method that tuples have
    """How many samples of ``batch`` count."""
    global_count: int
    """How many samples all ranks have together in this step."""


@dataclass(frozen=True)
class DataPosition:
    """How far the samples of a run have been taken: enough to continue at the next sample on any number of devices."""

    seed: int
    """What the order of all epochs is drawn from."""
    epoch: int = 0
    """The epoch, from 0."""
    samples: int = 0
    """How many samples of that epoch all ranks together have taken."""

    def __post_init__(self) -> None:
        for name in ("epoch", "samples"):
            if getattr(self, name) < 0:
                raise ConfigError(f"Position.{name} is {getattr(self, name)}; it counts from 0")

    def to_dict(self) -> dict[str, int]:
        """Return the fields as a dict of numbers, for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> DataPosition:
        """Return the position that ``to_dict`` wrote.

        Raises ``CheckpointError`` where a field is missing.
        """
        missing = [name for name in ("seed", "epoch", "samples") if name not in state]
        if missing:
            raise CheckpointError(f"the saved data position lacks {', '.join(missing)}; it has {sorted(state)}")
        return cls(int(state["seed"]), int(state["epoch"]), int(state["samples"]))


def part_bounds(length: int, index: int, parts: int) -> tuple[int, int]:
    """Return where part ``index`` of ``parts`` begins and ends among ``length`` samples, as ``torch.tensor_split`` cuts.

    >>> [part_bounds(11, index, 3) for index in range(3)]
    [(0, 4), (4, 8), (8, 11)]
    """
    base, extra = divmod(length, parts)
    start = index * base + min(index, extra)
    return start, start + base + (index < extra)
