"""DataLoader of an image set: a random transform of each sample, normalization of each batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from duoka.recipes.datasets.images import Images, Statistics


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """``Images`` as a map-style data set: sample ``i`` is ``(uint8 (channels, height, width), label)``."""

    def __init__(self, images: Images, transform: Callable[[Tensor], Tensor] | None = None) -> None:
        self.images = images
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images.pixels[index]
        label = int(self.images.labels[index])
        return (image if self.transform is None else self.transform(image)), label


class Collate:
    """Joins samples into ``(float32 (batch, channels, height, width), int64 (batch,))``, normalized, then mixed."""

    def __init__(
        self, statistics: Statistics, mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    ) -> None:
        self.mix = mix
        self.mean = torch.tensor(statistics.mean).view(-1, 1, 1) * 255
        self.std = torch.tensor(statistics.std).view(-1, 1, 1) * 255

    def __call__(self, samples: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        """Return the batch of these ``(image, label)`` samples."""
        images, labels = zip(*samples, strict=True)
        batch = torch.stack(images).float().sub_(self.mean).div_(self.std), torch.tensor(labels)
        return batch if self.mix is None else self.mix(*batch)


def loader(images: Images, collate: Collate, batch_size: int, workers: int, transform: Any = None) -> DataLoader[Any]:
    """Return a loader of ``images``, shuffled and transformed if there is a ``transform``."""
    return DataLoader(
        ImageDataset(images, transform),
        batch_size=batch_size,
        shuffle=transform is not None,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=collate,
    )
