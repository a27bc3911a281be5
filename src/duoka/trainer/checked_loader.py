"""A rank's part of the user's data, checked to be the same on every rank and not empty."""

import contextlib
import copy
from collections.abc import Iterator, Sized
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from duoka.data import DeviceResidentLoader, LocalBatch, ShardedLoader, local_batches, require_same_stream
from duoka.errors import DataError
from duoka.strategy import Strategy
from duoka.trainer.fit_spec import FitSpec
from duoka.world import World


class CheckedLoader:
    """Iterates over a ``ShardedLoader``.

    Raises:
        DataError: there are no samples (found at the end for data without length), or ranks read different streams.

    """

    def __init__(self, loader: ShardedLoader, empty: DataError, name: str, world: World) -> None:
        self.loader, self.empty, self.name, self.world = loader, empty, name, world
        self.set_position, self.close = loader.set_position, loader.close
        with contextlib.suppress(TypeError, NotImplementedError):  # the length is unknown
            if len(loader) == 0:
                raise empty
        if loader.samples_per_epoch == 0:
            raise empty

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[LocalBatch]:
        at_start = self.loader.position.samples == 0
        batches = iter(self.loader)
        first = next(batches, None)  # every rank reads a stream completely, so the first samples must be the same
        require_same_stream(self.world.all_gather_object(self.loader.fingerprint), self.name)
        if first is not None:
            yield first
            yield from batches
        elif at_start:
            raise self.empty


def build_loader(spec: FitSpec, name: str, strategy: Strategy) -> CheckedLoader:
    """Return this rank's part of the ``train_data``, ``eval_data`` or ``test_data`` of ``spec``."""
    world, data, training = strategy.world, getattr(spec, name), name == "train_data"
    merged = strategy.replicas if spec.config.batch_size_means == "per_device" else 1
    loader = local_batches(
        data, rank=world.rank, world_size=world.size, seed=spec.config.seed, batches_per_step=merged, training=training
    )
    return CheckedLoader(loader, _empty_error(name, data, merged if training else 1), name, world)


def _empty_error(name: str, data: Any, batches_per_step: int) -> DataError:
    """Return the error for data without samples."""
    dataset = getattr(data, "dataset", None)
    length = len(dataset) if isinstance(dataset, Sized) else 0
    size = loader_batch_size(data)
    drops = getattr(data, "drop_last", False) or getattr(getattr(data, "batch_sampler", None), "drop_last", False)
    if not (length and drops):
        return DataError(f"{name} is empty (a {type(data).__name__} of length 0); give data with at least one sample")
    devices = f" on each of {batches_per_step} devices" if batches_per_step > 1 else ""
    return DataError(
        f"{name} has no batch: its {length} samples are fewer than batch_size={size}{devices}, and drop_last=True drops an "
        "incomplete batch; give drop_last=False or a smaller batch_size"
    )


def loader_batch_size(data: Any) -> Any:
    """Return the batch size of a ``DataLoader`` or its batch sampler, ``None`` if it is unknown before loading."""
    return getattr(data, "batch_size", None) or getattr(getattr(data, "batch_sampler", None), "batch_size", None)


def part_size(spec: FitSpec, replicas: int) -> int | None:
    """Return how many samples of a batch a device gets, ``None`` if that is unknown before loading."""
    size = loader_batch_size(spec.train_data)
    if not isinstance(size, int):
        return None
    return size if spec.config.batch_size_means == "per_device" else -(-size // replicas)


def in_dataset_order(data: Any) -> Any:
    """Return a copy of a shuffled ``DataLoader`` in the order of its data set, and any other ``data`` unchanged."""
    if isinstance(data, DeviceResidentLoader):
        return data.in_order()
    batches = getattr(data, "batch_sampler", None) if isinstance(data, DataLoader) else None
    if type(batches) is not BatchSampler or type(batches.sampler) is not RandomSampler:
        return data
    ordered = copy.copy(data)
    sampler = SequentialSampler(data.dataset)
    in_order = BatchSampler(sampler, batches.batch_size, batches.drop_last)
    vars(ordered).update(sampler=sampler, batch_sampler=in_order)  # DataLoader refuses to set these attributes
    return ordered
