"""Device-resident data: ``resident``, its loader, and the source of local batches for ``shard``.

Each rank keeps all data on its device, and makes its own shard of each global batch there.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset, default_collate

from duoka.data.counter_rng import counter_uniform, seed_at
from duoka.data.position import LocalBatch
from duoka.data.rng import ACCELERATOR, TORCH, IsolatedRng
from duoka.data.sources.base import BatchSource, ShardSpec, order_seed, samples_seed
from duoka.data.transforms import BatchTransform, apply
from duoka.errors import ConfigError, DataError
from duoka.log import logger
from duoka.utils.text import format_bytes
from duoka.utils.validation import check_integer
from duoka.world import current_world

MEMORY_FRACTION = 0.5
"""The fraction of a device's free memory that data may take: model, gradients and activations need the rest."""
Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(eq=False, repr=False)
class DeviceResidentLoader:
    """A loader that keeps its data on the device; built by ``resident``. One iteration yields one epoch's batches."""

    tensors: tuple[Tensor, ...]
    batch_size: int
    shuffle: bool
    drop_last: bool
    transforms: tuple[BatchTransform, ...]
    mix: Mix | None
    seed: int
    device: torch.device | None
    epoch: int = field(default=0, init=False)
    """The epoch of the next iteration; only iterating without a Trainer increases it."""
    _copies: dict[torch.device, tuple[Tensor, ...]] = field(default_factory=dict, init=False)

    @property
    def dataset(self) -> TensorDataset:
        """The original samples, on the host."""
        return TensorDataset(*self.tensors)

    def __len__(self) -> int:
        whole, rest = divmod(len(self.tensors[0]), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        for local in ResidentSource(self, ShardSpec(0, 1, 1, training=True)).epoch(self.seed, epoch, 0):
            yield local.batch

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_copies": {}}

    def in_order(self) -> DeviceResidentLoader:
        """Return a copy without shuffling and random transforms, for predictions."""
        fixed = copy.copy(self)
        fixed.shuffle, fixed.mix = False, None
        fixed.transforms = tuple(transform for transform in self.transforms if not transform.num_random)
        return fixed

    def batch(self, samples: Tensor, places: Tensor, stream: int, mix_seed: int | None = None) -> tuple[Tensor, ...]:
        """Return the batch of ``samples``, int64 ``(count,)`` on the host, transformed by their ``places`` in the epoch.

        With ``mix_seed``, the seed of the global batch's mix, the first sample is only mixed into the second, and is
        left out of the result.
        """
        device = current_world().device if self.device is None else self.device
        tensors = self._on(device)
        inputs, *others = (tensor[samples.to(tensor.device)].to(device) for tensor in tensors)
        inputs = _transform(self.transforms, inputs, lambda count: counter_uniform(stream, places.to(device), count))
        if mix_seed is None:
            return (inputs, *others)
        assert self.mix is not None
        with IsolatedRng(mix_seed, (TORCH, ACCELERATOR)):
            mixed = self.mix(inputs, *others)
        return tuple(tensor[1:] for tensor in mixed)

    def _on(self, device: torch.device) -> tuple[Tensor, ...]:
        """Return the data on ``device``, or on the host if they would take too much of the device's memory."""
        if device.type == "cpu":
            return self.tensors
        if device not in self._copies:
            needed, free = sum(tensor.nbytes for tensor in self.tensors), _free_bytes(device)
            if free is not None and needed > MEMORY_FRACTION * free:
                logger.warning(
                    "the data stay on the host: their %s are more than %.0f%% of the %s that %s has free. Every batch is "
                    "copied to the device and transformed there",
                    format_bytes(needed), 100 * MEMORY_FRACTION, format_bytes(free), device,
                )  # fmt: skip
                self._copies[device] = self.tensors
            else:
                self._copies[device] = tuple(tensor.to(device) for tensor in self.tensors)
        return self._copies[device]


class ResidentSource(BatchSource):
    """Local batches of a ``DeviceResidentLoader``."""

    def __init__(self, loader: DeviceResidentLoader, spec: ShardSpec) -> None:
        self._loader, self._spec = loader, spec
        self._drop_last = spec.training and loader.drop_last
        length, unit = len(loader.tensors[0]), loader.batch_size
        self._length = length // unit * unit if loader.drop_last else length
        whole = unit * spec.batches_per_step
        self.samples: int = self._length // whole * whole if self._drop_last else self._length

    def __len__(self) -> int:
        return -(-self.samples // (self._loader.batch_size * self._spec.batches_per_step))

    def epoch(self, seed: int, epoch: int, skip: int) -> Iterator[LocalBatch]:
        """Yield the local batches of ``epoch``, without making the first ``skip`` samples."""
        loader, epoch = self._loader, self._spec.random_epoch(epoch)
        order = torch.arange(len(loader.tensors[0]))
        if loader.shuffle:
            order = torch.randperm(len(order), generator=torch.Generator().manual_seed(order_seed(seed, epoch)))
        stream = samples_seed(seed, epoch)
        for first, end in self._global_batches(skip):
            start, stop, count = self._spec.shard(end - first)
            if start == stop:
                yield LocalBatch(None, 0, end - first)
                continue
            places, mix_seed = torch.arange(first + start, first + stop), None
            if loader.mix is not None and self._spec.training:
                before = (first + start if start else end) - 1  # the mix partner; the first sample's is the last
                places = torch.cat([torch.tensor([before]), places])
                mix_seed = seed_at(~stream, first)
            yield LocalBatch(loader.batch(order[places], places, stream, mix_seed), count, end - first)

    def _global_batches(self, skip: int) -> Iterator[tuple[int, int]]:
        """Yield the first place of each global batch after ``skip`` samples, and the place after its last."""
        size, per_step = self._loader.batch_size, self._spec.batches_per_step
        edges = [skip, *range((skip // size + 1) * size, self._length, size)]
        starts = edges[::per_step] if skip < self._length else []
        for first, following in zip(starts, [*starts[1:], self._length], strict=True):
            if not self._drop_last or following - first > size * (per_step - 1):
                yield first, following


def resident(
    data: Any,
    *,
    batch_size: int,
    shuffle: bool = False,
    drop_last: bool = False,
    transforms: Sequence[BatchTransform] = (),
    mix: Mix | None = None,
    num_workers: int = 4,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> DeviceResidentLoader | DataLoader[Any]:
    """Return a loader that keeps ``data`` on the device and makes batches there, or a DataLoader if they are too large.

    The order is a function of (seed, epoch), and each sample's random transform one of (seed, epoch, place in the
    epoch): the same on any number of devices and after a resume. A ``Trainer`` sets its own seed.

    Args:
        data: tensors of equal length, the first of them the inputs (uint8 images ``(samples, channels, height, width)``
            become floats from 0 to 1 before ``transforms``); or a map-style data set of ``(tensor, label)``, which is
            read once. If it would take more than half of the free memory, a ``DataLoader`` with ``num_workers``
            processes reads it in every epoch, and the log gives the reason.
        batch_size: samples per batch, of each device or of all as the ``Trainer``'s option says.
        shuffle: whether each epoch has a new order.
        drop_last: whether to leave out an incomplete last batch.
        transforms: those of ``duoka.data.transforms``, or objects like them; each image has its own random numbers.
        mix: combines each sample of a batch with the one before it: torchvision's ``v2.MixUp`` or ``v2.CutMix``. A
            ``DataLoader`` mixes within each device's shard.
        num_workers: worker processes of the ``DataLoader``, if one is needed.
        seed: used without a Trainer.
        device: where to make batches; ``None`` is the device of the process that iterates.

    Raises:
        ConfigError: an option is not valid.
        DataError: no samples, or tensors of different lengths.

    >>> import torch
    >>> from duoka.data import resident, transforms
    >>> pixels, labels = torch.zeros(10, 3, 8, 8, dtype=torch.uint8), torch.arange(10)
    >>> loader = resident((pixels, labels), batch_size=4, shuffle=True, transforms=[transforms.RandomCrop(8, padding=1)])
    >>> [tuple(images.shape) for images, _ in loader]
    [(4, 3, 8, 8), (4, 3, 8, 8), (2, 3, 8, 8)]

    """
    check_integer("batch_size", batch_size, 1)
    check_integer("num_workers", num_workers, 0)
    tensors = _tensors(data)
    if isinstance(tensors, str):
        logger.warning("%s: a DataLoader with num_workers=%d reads them in every epoch", tensors, num_workers)
        dataset = TransformedDataset(data, tuple(transforms))
        collate = default_collate if mix is None else functools.partial(_mix_collate, mix)
        return DataLoader(
            dataset, batch_size, shuffle, num_workers=num_workers, collate_fn=collate, drop_last=drop_last,
            persistent_workers=num_workers > 0,
        )  # fmt: skip
    place = None if device is None else torch.device(device)
    return DeviceResidentLoader(tensors, batch_size, shuffle, drop_last, tuple(transforms), mix, seed, place)


class TransformedDataset(torch.utils.data.Dataset[Any]):
    """A data set that applies batch transforms to one sample at a time, for a DataLoader's workers."""

    def __init__(self, dataset: Any, transforms: tuple[BatchTransform, ...]) -> None:
        self.dataset, self.transforms = dataset, transforms

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        inputs, *others = self.dataset[index]
        if self.transforms:
            inputs = _transform(self.transforms, inputs[None], lambda count: torch.rand(1, count))[0]
        return (inputs, *others)


def _mix_collate(mix: Mix, samples: Any) -> tuple[Tensor, Tensor]:
    return mix(*default_collate(samples))


def _transform(transforms: Sequence[BatchTransform], inputs: Tensor, uniform: Callable[[int], Tensor]) -> Tensor:
    if not transforms:
        return inputs
    images = inputs.float().div_(255) if inputs.dtype == torch.uint8 else inputs
    return apply(transforms, images, uniform(sum(transform.num_random for transform in transforms)))


def _tensors(data: Any) -> tuple[Tensor, ...] | str:
    """Return the tensors to keep, or the reason for keeping none."""
    if isinstance(data, TensorDataset):
        data = data.tensors
    if isinstance(data, (tuple, list)) and data and all(isinstance(tensor, Tensor) for tensor in data):
        lengths = [len(tensor) for tensor in data]
        if len(set(lengths)) > 1:
            raise DataError(f"the tensors have {', '.join(map(str, lengths))} samples; give as many of each")
        return tuple(data)
    if not callable(getattr(data, "__getitem__", None)) or not callable(getattr(data, "__len__", None)):
        raise ConfigError(f"data is a {type(data).__name__}; give a tuple of tensors or a map-style data set")
    return _load_into_memory(data)


def _load_into_memory(dataset: Any) -> tuple[Tensor, ...] | str:
    """Read a data set once, in threads, because decoding releases the interpreter lock."""
    if not len(dataset):
        raise DataError(f"the data set {type(dataset).__name__} has no sample; give one that has")
    first = default_collate([dataset[0]])
    if not isinstance(first, list) or not all(isinstance(tensor, Tensor) for tensor in first):
        raise DataError(
            f"samples of {type(dataset).__name__} are no tuples of tensors and numbers; give (image, label)"
        )
    needed, free = sum(tensor.nbytes for tensor in first) * len(dataset), psutil.virtual_memory().available
    if needed > MEMORY_FRACTION * free:
        limit = f"{100 * MEMORY_FRACTION:.0f}% of the {format_bytes(free)} of free memory"
        return f"the data are not kept, as their {format_bytes(needed)} are more than {limit}"
    kept = tuple(torch.empty((len(dataset), *tensor.shape[1:]), dtype=tensor.dtype) for tensor in first)

    def read(index: int) -> bool:
        sample = default_collate([dataset[index]])
        if any(tensor.shape != expected.shape for tensor, expected in zip(sample, first, strict=True)):
            return False
        for whole, tensor in zip(kept, sample, strict=True):
            whole[index] = tensor[0]
        return True

    with ThreadPoolExecutor() as pool:
        has_one_shape = all(pool.map(read, range(len(dataset))))
    return kept if has_one_shape else "the data are not kept, as samples have different shapes"


def _free_bytes(device: torch.device) -> int | None:
    """Return the free memory of an accelerator, or ``None`` if the accelerator does not report it."""
    try:
        return int(torch.get_device_module(device).mem_get_info(device)[0])
    except (AttributeError, RuntimeError):
        return None
