"""What every source of images is read into: uint8 tensors, labels, and the facts that a model must be told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duoka.errors import DataError, StorageError
from duoka.utils.imports import import_optional

__all__ = ["ImageSet", "Images", "Statistics", "read_image", "statistics_of", "stratified_split", "write_image"]


@dataclass(frozen=True)
class Images:
    """Labelled images, kept as bytes: four times smaller than floats, and quick to hand to other processes."""

    pixels: Tensor
    """uint8 ``(images, channels, height, width)``"""
    labels: Tensor
    """int64 ``(images,)``, places in ``ImageSet.classes``"""

    def __post_init__(self) -> None:
        if len(self.pixels) != len(self.labels):
            raise DataError(f"there are {len(self.pixels)} images and {len(self.labels)} labels: one label an image")

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, places: Tensor) -> Images:
        """Return the images at ``places``, in that order."""
        return Images(self.pixels[places], self.labels[places])


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of each channel of the training images, with pixels from 0 to 1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class ImageSet:
    """A set of labelled images in two parts, of one size."""

    name: str
    classes: tuple[str, ...]
    train: Images
    test: Images
    mirrored_alike: bool = True
    """Whether an image's mirror image has the same label: not so for digits."""
    statistics: Statistics | None = None
    """Those of the training images, where they are known already; ``statistics_of`` counts them else."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """An image's ``(channels, height, width)``."""
        channels, height, width = self.train.pixels.shape[1:]
        return channels, height, width


def statistics_of(images: Images) -> Statistics:
    """Return the exact statistics of ``images``, counted from a histogram of each channel's 256 values."""
    counts = torch.stack([torch.bincount(channel.reshape(-1), minlength=256) for channel in images.pixels.unbind(1)])
    share = counts.double() / counts.sum(dim=1, keepdim=True)
    value = torch.arange(256, dtype=torch.float64) / 255
    mean = share @ value
    std = (share @ value.square() - mean.square()).clamp_min(0).sqrt()
    std[std == 0] = 1  # a channel that is the same everywhere says nothing, and must not divide by zero
    return Statistics(tuple(mean.tolist()), tuple(std.tolist()))


def stratified_split(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split places ``0 .. len(labels) - 1`` into ``(train, test)`` with ``share`` of each class in ``test``.

    A class of two images or more has at least one in either part; a class of one is for training. The split is a
    function of ``labels``, ``share`` and ``seed`` alone.
    """
    generator = torch.Generator().manual_seed(seed)
    train, test = [], []
    for label in torch.unique(labels):
        places = (labels == label).nonzero().flatten()
        places = places[torch.randperm(len(places), generator=generator)]
        count = min(max(1, round(share * len(places))), len(places) - 1)
        test.append(places[:count])
        train.append(places[count:])
    return torch.cat(train).sort().values, torch.cat(test).sort().values


def read_image(path: str | Path, shape: Sequence[int], *, invert: bool = False) -> Tensor:
    """Read an image file of any size, grey or colour, into uint8 ``shape = (channels, height, width)``.

    It is turned upright as its camera noted, transparent parts become white, and it is scaled and cropped around its
    centre to the height and width.

    Raises:
        DataError: the file is missing or is no image that can be read; the message names it.

    """
    image_module, image_ops = (
        import_optional("PIL.Image", extra="vision"),
        import_optional("PIL.ImageOps", extra="vision"),
    )
    channels, height, width = shape
    try:
        with image_module.open(path) as file:
            image = _flattened(image_ops.exif_transpose(file), image_module)
    except FileNotFoundError as error:
        raise DataError(f"there is no image {path}") from error
    except IsADirectoryError as error:
        raise DataError(f"{path} is a folder, not an image: name images, such as {Path(path) / '*.png'}") from error
    except (OSError, ValueError, SyntaxError, image_module.DecompressionBombError) as error:
        remedy = "is it an image, and complete? Replace or remove it"
        raise DataError(f"cannot read the image {path}: {error}: {remedy}") from error
    image = image_ops.fit(image.convert("L" if channels == 1 else "RGB"), (width, height))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(height, width, channels)
    return (255 - pixels if invert else pixels).permute(2, 0, 1).contiguous()


def write_image(path: Path, pixels: Tensor) -> None:
    """Write uint8 ``pixels (channels, height, width)`` to a file of the kind that its name ends in."""
    array = pixels.squeeze(0).numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).contiguous().numpy()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        import_optional("PIL.Image", extra="vision").fromarray(array).save(path)
    except OSError as error:
        raise StorageError(f"cannot write the image {path}: {error}") from error


def _flattened(image: Any, image_module: Any) -> Any:
    """Return ``image`` with 8 bits a channel and no transparency."""
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
        return image.point(lambda value: value / 257).convert("L")
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return image_module.alpha_composite(image_module.new("RGBA", image.size, "white"), image)
    image.load()
    return image
