"""From an image set to batches for a model: random crop and flip a sample, normalisation a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from duoka.recipes.datasets.images import Images, ImageSet, Statistics
from duoka.utils.imports import import_optional

if TYPE_CHECKING:
    Samples = Dataset[tuple[Tensor, int]]
else:
    Samples = Dataset

__all__ = ["Collate", "ImageDataset", "augmentation", "loader"]


class ImageDataset(Samples):
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
    """Joins samples into ``(float32 (batch, channels, height, width), int64 (batch,))``, normalised, and mixed by ``mix``."""

    def __init__(
        self, statistics: Statistics, mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    ) -> None:
        self.mix = mix
        self.mean = torch.tensor(statistics.mean).view(-1, 1, 1) * 255
        self.std = torch.tensor(statistics.std).view(-1, 1, 1) * 255

    def __call__(self, samples: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        """Return the batch of these ``(image, label)`` samples."""
        images, labels = zip(*samples, strict=True)
        batch = self.normalise(torch.stack(images)), torch.tensor(labels)
        return batch if self.mix is None else self.mix(*batch)

    def normalise(self, pixels: Tensor) -> Tensor:
        """Return uint8 images ``(batch, channels, height, width)`` as floats of mean 0 and deviation 1."""
        return pixels.float().sub_(self.mean).div_(self.std)


def augmentation(images: ImageSet) -> Callable[[Tensor], Tensor]:
    """Return what changes a training image at random: a shift within a border, and a flip where that is the same thing.

    The border is 4 pixels for 32 (He et al., 2015), and as much of other sizes.
    """
    v2: Any = import_optional("torchvision.transforms.v2", extra="vision")
    _, height, width = images.shape
    steps = [v2.RandomCrop((height, width), padding=max(1, min(height, width) // 8))]
    if images.mirrored_alike:
        steps.append(v2.RandomHorizontalFlip())
    changed: Callable[[Tensor], Tensor] = v2.Compose(steps)
    return changed


def loader(images: Images, collate: Collate, batch_size: int, workers: int, transform: Any = None) -> DataLoader[Any]:
    """Return a loader of ``images``; shuffled and changed by ``transform`` where there is one."""
    return DataLoader(
        ImageDataset(images, transform),
        batch_size=batch_size,
        shuffle=transform is not None,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=collate,
    )
