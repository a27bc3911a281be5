"""``resident``: data that stay on the device, where batches are made of them; or a DataLoader, and the reason why."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset, default_collate

from duoka.data.counter_rng import counter_uniform
from duoka.data.rng import ACCELERATOR, TORCH, IsolatedRng, derive_seed
from duoka.data.transforms import BatchTransform, apply
from duoka.errors import ConfigError, DataError
from duoka.log import logger
from duoka.world import current_world

__all__ = ["DeviceResidentLoader", "resident"]

MEMORY_SHARE = 0.5
"""How much of a device's free memory data may take: model, gradients and activations need the rest."""
Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class DeviceResidentLoader:
    """A loader that keeps its data on the device; built by ``resident``. Iterating it yields one epoch's batches there."""

    def __init__(
        self,
        tensors: tuple[Tensor, ...],
        *,
        batch_size: int,
        shuffle: bool,
        drop_last: bool,
        transforms: tuple[BatchTransform, ...],
        mix: Mix | None,
        seed: int,
        device: torch.device | None,
    ) -> None:
        self.tensors, self.batch_size, self.shuffle, self.drop_last = tensors, batch_size, shuffle, drop_last
        self.transforms, self.mix, self.seed, self.device = transforms, mix, seed, device
        self.epoch = 0
        """The epoch that the next iteration draws its order and changes for; only iterating without a Trainer counts it."""
        self._placed: dict[torch.device, tuple[Tensor, ...]] = {}

    @property
    def dataset(self) -> TensorDataset:
        """The data on the host, sample by sample and unchanged."""
        return TensorDataset(*self.tensors)

    def __len__(self) -> int:
        whole, rest = divmod(len(self.tensors[0]), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        from duoka.data.kept import ResidentSource
        from duoka.data.sources.base import ShardSpec

        epoch, self.epoch = self.epoch, self.epoch + 1
        for part in ResidentSource(self, ShardSpec(0, 1, 1, training=True)).epoch(self.seed, epoch, 0):
            yield part.batch

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_placed": {}}

    def in_order(self) -> DeviceResidentLoader:
        """Return the same without shuffling and changes at random: for predictions."""
        still = copy.copy(self)
        still.shuffle, still.mix = False, None
        still.transforms = tuple(transform for transform in self.transforms if not transform.num_random)
        return still

    def batch(self, samples: Tensor, places: Tensor, stream: int, mixed: int | None = None) -> tuple[Tensor, ...]:
        """Return the batch of ``samples``, int64 ``(count,)`` on the host, changed as their ``places`` in the epoch say.

        With ``mixed``, the seed that the whole global batch is mixed by, the first sample is there only to be mixed into the
        second, and is left out of what is returned.
        """
        device = current_world().device if self.device is None else self.device
        tensors = self._on(device)
        inputs, *others = (tensor[samples.to(tensor.device)].to(device) for tensor in tensors)
        if self.transforms:
            draws = counter_uniform(
                stream, places.to(device), sum(transform.num_random for transform in self.transforms)
            )
            inputs = apply(self.transforms, inputs.float().div_(255) if inputs.dtype == torch.uint8 else inputs, draws)
        if mixed is None:
            return (inputs, *others)
        assert self.mix is not None
        with IsolatedRng(mixed, (TORCH, ACCELERATOR)):
            mixture = self.mix(inputs, *others)
        return tuple(part[1:] for part in mixture)

    def _on(self, device: torch.device) -> tuple[Tensor, ...]:
        """Return the data on ``device``, or on the host where they would take too much of its memory."""
        if device.type == "cpu":
            return self.tensors
        if device not in self._placed:
            needed, free = sum(tensor.nbytes for tensor in self.tensors), _free_bytes(device)
            if free is not None and needed > MEMORY_SHARE * free:
                logger.warning(
                    "the data stay on the host, as their %s are more than %.0f%% of the %s that %s has free; every batch is "
                    "sent there and changed there",
                    _size(needed), 100 * MEMORY_SHARE, _size(free), device,
                )  # fmt: skip
                self._placed[device] = self.tensors
            else:
                self._placed[device] = tuple(tensor.to(device) for tensor in self.tensors)
        return self._placed[device]


def resident(
    data: Any,
    *,
    batch_size: int,
    shuffle: bool = False,
    drop_last: bool = False,
    transforms: Sequence[BatchTransform] = (),
    mix: Mix | None = None,
    workers: int = 4,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> DeviceResidentLoader | DataLoader[Any]:
    """Return a loader that keeps ``data`` on the device and makes batches there, or a DataLoader where they are too large.

    The order is a function of (seed, epoch), and each sample's random change one of (seed, epoch, place in the epoch): the
    same on any number of devices and after a resume. A ``Trainer`` gives its own seed.

    Args:
        data: tensors of equal length, the first of them the inputs (uint8 images ``(samples, channels, height, width)``
            become floats from 0 to 1 before ``transforms``); or a map-style data set of ``(tensor, label)``, which is read
            once. Where decoded it would take more than half of the free memory, a ``DataLoader`` with ``workers``
            processes reads it in every epoch, and the log says so.
        batch_size: samples a batch, of each device or all together as the ``Trainer``'s option says.
        shuffle: whether each epoch has an order of its own.
        drop_last: whether an incomplete last batch is left out.
        transforms: those of ``duoka.data.transforms``, or objects like them; each image has random numbers of its own.
        mix: what combines each sample of a batch with the one before it: torchvision's ``v2.MixUp`` or ``v2.CutMix``. A
            ``DataLoader`` mixes each device's part of a batch in itself.
        workers: processes of the ``DataLoader``, where one is needed.
        seed: where no Trainer gives one.
        device: where batches are made; ``None`` is the device of the process that iterates.

    Raises:
        ConfigError: an option that cannot be.
        DataError: no samples, or tensors of different lengths.

    >>> import torch
    >>> from duoka.data import resident, transforms
    >>> pixels, labels = torch.zeros(10, 3, 8, 8, dtype=torch.uint8), torch.arange(10)
    >>> loader = resident((pixels, labels), batch_size=4, shuffle=True, transforms=[transforms.RandomCrop(8, padding=1)])
    >>> [tuple(images.shape) for images, _ in loader]
    [(4, 3, 8, 8), (4, 3, 8, 8), (2, 3, 8, 8)]

    """
    if batch_size < 1 or workers < 0:
        raise ConfigError(f"batch_size is {batch_size} and workers {workers}; they are 1 and 0 or more")
    tensors = _tensors(data)
    if isinstance(tensors, str):
        logger.warning("%s: a DataLoader with %d worker processes reads them in every epoch", tensors, workers)
        dataset = TransformedDataset(data, tuple(transforms))
        collate = default_collate if mix is None else MixCollate(mix)
        return DataLoader(
            dataset, batch_size, shuffle, num_workers=workers, collate_fn=collate, drop_last=drop_last,
            persistent_workers=workers > 0,
        )  # fmt: skip
    chosen = None if device is None else torch.device(device)
    return DeviceResidentLoader(
        tensors, batch_size=batch_size, shuffle=shuffle, drop_last=drop_last, transforms=tuple(transforms), mix=mix, seed=seed,
        device=chosen,
    )  # fmt: skip


class TransformedDataset(torch.utils.data.Dataset[Any]):
    """A data set whose inputs are changed one by one: what ``resident`` does a batch, for a DataLoader's workers."""

    def __init__(self, dataset: Any, transforms: tuple[BatchTransform, ...]) -> None:
        self.dataset, self.transforms = dataset, transforms

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        inputs, *others = self.dataset[index]
        if self.transforms:
            draws = torch.rand(1, sum(transform.num_random for transform in self.transforms))
            images = inputs[None].float().div_(255) if inputs.dtype == torch.uint8 else inputs[None]
            inputs = apply(self.transforms, images, draws)[0]
        return (inputs, *others)


class MixCollate:
    """A collation that ends with mixing the batch."""

    def __init__(self, mix: Mix) -> None:
        self.mix = mix

    def __call__(self, samples: Any) -> tuple[Tensor, Tensor]:
        """Return the mixed batch of ``samples``."""
        return self.mix(*default_collate(samples))


def _tensors(data: Any) -> tuple[Tensor, ...] | str:
    """Return what is kept, or why it is not."""
    if isinstance(data, TensorDataset):
        data = data.tensors
    if isinstance(data, (tuple, list)) and data and all(isinstance(tensor, Tensor) for tensor in data):
        lengths = [len(tensor) for tensor in data]
        if len(set(lengths)) > 1:
            raise DataError(f"the tensors have {', '.join(map(str, lengths))} samples: give as many of each")
        return tuple(data)
    if not callable(getattr(data, "__getitem__", None)) or not callable(getattr(data, "__len__", None)):
        raise ConfigError(f"data is a {type(data).__name__}: give a tuple of tensors or a map-style data set")
    return _read(data)


def _read(dataset: Any) -> tuple[Tensor, ...] | str:
    """Read a data set once, in threads, as decoding leaves the interpreter to others."""
    if not len(dataset):
        raise DataError(f"the data set {type(dataset).__name__} has no sample: give one that has")
    first = default_collate([dataset[0]])
    if not isinstance(first, list) or not all(isinstance(part, Tensor) for part in first):
        raise DataError(
            f"samples of {type(dataset).__name__} are no tuples of tensors and numbers: give (image, label)"
        )
    needed, free = sum(part.nbytes for part in first) * len(dataset), psutil.virtual_memory().available
    if needed > MEMORY_SHARE * free:
        share = f"{100 * MEMORY_SHARE:.0f}% of the {_size(free)} of memory that are free"
        return f"the data are not kept, as their {_size(needed)} are more than {share}"
    kept = tuple(torch.empty((len(dataset), *part.shape[1:]), dtype=part.dtype) for part in first)

    def read(place: int) -> bool:
        sample = default_collate([dataset[place]])
        if any(part.shape != own.shape for part, own in zip(sample, first, strict=True)):
            return False
        for whole, part in zip(kept, sample, strict=True):
            whole[place] = part[0]
        return True

    with ThreadPoolExecutor() as pool:
        same_stream = all(pool.map(read, range(len(dataset))))
    return kept if same_stream else "the data are not kept, as samples have different shapes"


def mix_seed(stream: int, first: int) -> int:
    """Return the seed that the global batch which begins at place ``first`` is mixed by."""
    return derive_seed(~stream, first)


def _free_bytes(device: torch.device) -> int | None:
    """Return the free memory of an accelerator, ``None`` where it does not tell."""
    try:
        return int(torch.get_device_module(device).mem_get_info(device)[0])
    except (AttributeError, RuntimeError):
        return None


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
