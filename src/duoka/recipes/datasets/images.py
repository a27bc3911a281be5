"""Labeled images of one size as uint8 tensors: statistics, splits, loaders, image files, and handwritten digits."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from duoka.errors import DataError
from duoka.utils.files import atomic_write, open_file
from duoka.utils.imports import import_optional
from duoka.utils.text import first_line, join_names

Transform = Callable[[Tensor], Tensor]
Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
DECODED_AT_ONCE = 512
"""Images between two steps of the progress bar."""
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
"""Formats that are read, whatever the file is called: Pillow hands some others, such as PostScript, to another program."""
EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")
"""Suffixes of image files in folders of images; other files there are ignored."""
MAX_PIXELS = 50_000_000
MAX_BYTES = 500_000_000


@dataclass(frozen=True)
class Images:
    """Labeled images as bytes, which take a quarter of the memory of floats."""

    pixels: Tensor
    """uint8 ``(images, channels, height, width)``"""
    labels: Tensor
    """int64 ``(images,)``, indices into ``ImageSet.classes``"""

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: Tensor) -> Images:
        """Return the images at ``indices``, in that order."""
        return Images(self.pixels[indices], self.labels[indices])


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of each channel of the training images, with pixels from 0 to 1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class ImageSet:
    """Labeled images of one size for training and for the test."""

    name: str
    classes: tuple[str, ...]
    train: Images
    test: Images
    flip_keeps_label: bool = True
    """Whether the mirror image has the same label, which is false for digits."""
    statistics: Statistics | None = None
    """Statistics of the training images if they are known; otherwise ``channel_statistics`` computes them."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """An image's ``(channels, height, width)``."""
        channels, height, width = self.train.pixels.shape[1:]
        return channels, height, width


def channel_statistics(pixels: Tensor) -> Statistics:
    """Return exact statistics of ``pixels (images, channels, height, width)`` from a histogram of each channel."""
    counts = torch.stack([torch.bincount(channel.reshape(-1), minlength=256) for channel in pixels.unbind(1)])
    share = counts.double() / counts.sum(dim=1, keepdim=True)
    value = torch.arange(256, dtype=torch.float64) / 255
    mean = share @ value
    std = (share @ value.square() - mean.square()).clamp_min(0).sqrt()
    std[std == 0] = 1  # a constant channel must not divide by zero
    return Statistics(tuple(mean.tolist()), tuple(std.tolist()))


def stratified_split(labels: Tensor, test_share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return indices ``(train, test)`` with ``test_share`` of each class in ``test``.

    A class of two or more images has at least one in each part; the image of a class of one is for training.
    """
    generator = torch.Generator().manual_seed(seed)
    train, test = [], []
    for label in torch.unique(labels):
        indices = (labels == label).nonzero().flatten()
        indices = indices[torch.randperm(len(indices), generator=generator)]
        count = min(max(1, round(test_share * len(indices))), len(indices) - 1)
        test.append(indices[:count])
        train.append(indices[count:])
    return torch.cat(train).sort().values, torch.cat(test).sort().values


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """``Images`` as a map-style data set: sample ``i`` is ``(uint8 (channels, height, width), label)``."""

    def __init__(self, images: Images, transform: Transform | None = None) -> None:
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

    def __init__(self, statistics: Statistics, mix: Mix | None = None) -> None:
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


def load_digits(*, test_share: float = 0.2, split_seed: int = 0) -> ImageSet:
    """Return scikit-learn's 1,797 gray digits of 8x8 pixels, bright on a dark ground, with ``test_share`` of each class in
    the test part.

    Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.
    """
    bunch = import_optional("sklearn.datasets", extra="vision").load_digits()
    pixels = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
    images = Images(pixels, torch.from_numpy(bunch.target).long())
    train, test = stratified_split(images.labels, test_share, split_seed)
    classes = tuple(str(name) for name in bunch.target_names)
    return ImageSet("digits", classes, images.select(train), images.select(test), flip_keeps_label=False)


def read_images(paths: Sequence[Path], out: Tensor, *, description: str | None = None) -> None:
    """Read image files into uint8 ``out (images, channels, height, width)``, with a progress bar if it has a description.

    Threads decode in parallel, because Pillow releases the interpreter's lock.

    Raises DataError if a file is missing or not a readable image.
    """
    from rich.console import Console
    from rich.progress import track

    def read_one(index: int) -> None:
        out[index] = read_image(paths[index], out.shape[1:])

    starts = track(
        range(0, len(paths), DECODED_AT_ONCE),
        description or "",
        disable=description is None,
        console=Console(stderr=True, force_jupyter=False),
    )
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            for start in starts:
                list(pool.map(read_one, range(start, min(start + DECODED_AT_ONCE, len(paths)))))
        except DataError:
            pool.shutdown(cancel_futures=True)
            raise


def read_image(path: str | Path, shape: Sequence[int], *, invert: bool = False) -> Tensor:
    """Read an image file of any size, gray or color, into uint8 ``shape = (channels, height, width)``.

    The image is turned upright by its EXIF orientation, transparent pixels become white, and it is scaled and cropped
    around its center.

    Raises DataError if the file is missing or not a readable image; the message names it.
    """
    image_ops = import_optional("PIL.ImageOps", extra="vision")
    image_module = image_ops.Image
    channels, height, width = shape
    try:
        with open_file(path, MAX_BYTES) as file, _open_image(file, path, image_module) as opened:
            image = _to_opaque_8_bit(image_ops.exif_transpose(opened), image_module)
            image = image_ops.fit(image.convert("L" if channels == 1 else "RGB"), (width, height))
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"there is no image {path}") from error
    except IsADirectoryError as error:
        raise DataError(f"{path} is a folder, not an image: name images, such as {Path(path) / '*.png'}") from error
    except Exception as error:  # Pillow raises errors of many types for damaged files
        reason = getattr(error, "strerror", None) or first_line(error)
        remedy = "is it an image, and complete? Replace or remove it"
        raise DataError(f"cannot read the image {path}: {reason}: {remedy}") from error
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(height, width, channels)
    return (255 - pixels if invert else pixels).permute(2, 0, 1).contiguous()


def _open_image(file: BinaryIO, path: str | Path, image_module: Any) -> Any:
    """Open an image of one of the ``FORMATS`` with at most ``MAX_PIXELS`` pixels; nothing is decoded yet."""
    too_large = f"the image {path} has more than {MAX_PIXELS:,} pixels, which would fill the memory: scale it down"
    try:
        image = image_module.open(file, formats=FORMATS)
    except (image_module.DecompressionBombError, image_module.DecompressionBombWarning) as error:
        raise DataError(too_large) from error
    except image_module.UnidentifiedImageError as error:
        raise DataError(
            f"cannot read the image {path}: it is no {join_names(FORMATS, 'or')} file, or damaged. Replace or remove it"
        ) from error
    if image.width * image.height > MAX_PIXELS:
        raise DataError(too_large)
    return image


def write_image(path: Path, pixels: Tensor) -> None:
    """Write uint8 ``pixels (channels, height, width)`` as PNG. Raises StorageError if the file cannot be written."""
    array = pixels.squeeze(0).numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).contiguous().numpy()
    image = import_optional("PIL.Image", extra="vision").fromarray(array)
    with atomic_write(path) as file:
        image.save(file, format="png")


def _to_opaque_8_bit(image: Any, image_module: Any) -> Any:
    """Return ``image`` with 8 bits a channel and no transparency."""
    if image.mode.startswith("I"):  # 16-bit gray, which Pillow would clip at 255
        return image.point(lambda value: value / 257).convert("L")
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return image_module.alpha_composite(image_module.new("RGBA", image.size, "white"), image)
    image.load()
    return image
