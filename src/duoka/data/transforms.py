"""Random changes of images as operations on whole batches, each image with random numbers of its own.

A transform is called with images, float32 ``(batch, channels, height, width)`` from 0 to 1, and as many uniform random
numbers an image as its ``draws`` says, float32 ``(batch, draws)``; it returns images, and knows no generator.
Distributions are those of torchvision's transforms of the same names, which change one image at a time
(https://docs.pytorch.org/vision/stable/transforms.html).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from duoka.errors import ConfigError

__all__ = [
    "BatchTransform",
    "ColorJitter",
    "Normalize",
    "RandomCrop",
    "RandomHorizontalFlip",
    "RandomResizedCrop",
    "apply",
]

TRIES = 10
"""How often torchvision draws a box before it takes the centre."""


class BatchTransform(Protocol):
    """What ``resident`` takes."""

    @property
    def num_random(self) -> int:
        """How many random numbers it takes an image."""
        ...

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Return ``images``, changed as ``draws`` says."""
        ...


def apply(transforms: Sequence[BatchTransform], images: Tensor, draws: Tensor) -> Tensor:
    """Return ``images`` after all ``transforms``; ``draws (batch, sum of theirs)`` are dealt out in order."""
    first = 0
    for transform in transforms:
        images = transform(images, draws[:, first : first + transform.num_random])
        first += transform.num_random
    return images


@dataclass(frozen=True)
class RandomHorizontalFlip:
    """Mirrors an image with probability ``p``."""

    p: float = 0.5
    num_random = 1

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise ConfigError(f"RandomHorizontalFlip: p is {self.p}; it is a probability, 0 to 1")

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Return ``images``, some of them mirrored."""
        return torch.where((draws < self.p)[:, :, None, None], images.flip(-1), images)


@dataclass(frozen=True)
class RandomCrop:
    """Puts ``padding`` black pixels around an image and cuts ``size`` x ``size`` out of it, anywhere."""

    size: int
    padding: int = 0
    num_random = 2

    def __post_init__(self) -> None:
        if self.size < 1 or self.padding < 0:
            raise ConfigError(f"RandomCrop: size is {self.size} and padding {self.padding}; pixels, 1 and 0 or more")

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Return crops ``(batch, channels, size, size)``."""
        padded = functional.pad(images, [self.padding] * 4)
        batch, _, height, width = padded.shape
        if min(height, width) < self.size:
            raise ConfigError(
                f"RandomCrop: images of {height}x{width} pixels with their border are smaller than {self.size}"
            )
        top, left = (_randint_below(draws[:, axis], side - self.size + 1) for axis, side in enumerate((height, width)))
        windows = padded.unfold(2, self.size, 1).unfold(3, self.size, 1)
        return windows[torch.arange(batch, device=images.device), :, top, left]


@dataclass(frozen=True)
class RandomResizedCrop:
    """Cuts a box of random area and aspect out of an image and scales it to ``size`` x ``size``, bilinear with antialiasing.

    ``scale`` bounds the box's share of the area, ``ratio`` its width divided by its height.
    """

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    num_random = 2 * TRIES + 2

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"RandomResizedCrop: size is {self.size}; pixels, 1 or more")
        for name, (least, most) in (("scale", self.scale), ("ratio", self.ratio)):
            if not 0 < least <= most:
                raise ConfigError(
                    f"RandomResizedCrop: {name} is ({least}, {most}); two numbers above 0, the smaller first"
                )

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Return ``(batch, channels, size, size)``."""
        top, left, height, width = self.boxes(draws, images.shape[-2], images.shape[-1])
        rows, columns = (
            _resampling(top, height, images.shape[-2], self.size),
            _resampling(left, width, images.shape[-1], self.size),
        )
        batch, channels, inputs, _ = images.shape
        wide = torch.bmm(images.reshape(batch, channels * inputs, -1), columns.transpose(1, 2))
        wide = wide.view(batch, channels, inputs, self.size)
        return torch.stack([torch.bmm(rows, channel) for channel in wide.unbind(1)], dim=1)

    def boxes(self, draws: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return top, left, height and width of a box for each row of ``draws``, in pixels, ``(batch,)``."""
        tries = draws[:, :-2].view(len(draws), TRIES, 2)
        area = height * width * (self.scale[0] + tries[..., 0] * (self.scale[1] - self.scale[0]))
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        aspect = torch.exp(low + tries[..., 1] * (high - low))
        wide, tall = torch.sqrt(area * aspect).round(), torch.sqrt(area / aspect).round()
        fits = (wide > 0) & (wide <= width) & (tall > 0) & (tall <= height)
        first = fits.int().argmax(dim=1, keepdim=True)  # of equals the first
        middle = self._middle(height, width)
        wide, tall = (
            torch.where(fits.any(1), side.gather(1, first)[:, 0], own)
            for side, own in zip((wide, tall), middle, strict=True)
        )
        top, left = _randint_below(draws[:, -2], height - tall + 1), _randint_below(draws[:, -1], width - wide + 1)
        top = torch.where(fits.any(1), top, ((height - tall) / 2).floor())
        left = torch.where(fits.any(1), left, ((width - wide) / 2).floor())
        return top, left, tall, wide

    def _middle(self, height: int, width: int) -> tuple[float, float]:
        """Return width and height of the box that is taken where no try fits."""
        if width / height < self.ratio[0]:
            return float(width), float(round(width / self.ratio[0]))
        if width / height > self.ratio[1]:
            return float(round(height * self.ratio[1])), float(height)
        return float(width), float(height)


@dataclass(frozen=True)
class ColorJitter:
    """Changes brightness, contrast, saturation and hue by random factors, in an order of each image's own.

    Each of the first three is the largest change of a factor from 1; ``hue``, 0 to 0.5, is the largest turn of the
    colour circle.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            if getattr(self, name) < 0:
                raise ConfigError(f"ColorJitter: {name} is {getattr(self, name)}; it is 0 or more")
        if not 0 <= self.hue <= 0.5:
            raise ConfigError(f"ColorJitter: hue is {self.hue}; it is a share of the colour circle, 0 to 0.5")

    @property
    def num_random(self) -> int:
        """A place in the order and a factor for each of four changes."""
        return 8

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Return ``images``, grey ``(batch, 1, ...)`` or colour ``(batch, 3, ...)``, from 0 to 1."""
        if images.shape[1] not in (1, 3):
            raise ConfigError(f"ColorJitter: images have {images.shape[1]} channels; it knows grey (1) and colour (3)")
        limits = images.new_tensor([self.brightness, self.contrast, self.saturation])
        low = (1 - limits).clamp_min(0)
        factors = low + draws[:, 4:7] * (1 + limits - low)
        turns = (2 * draws[:, 7] - 1) * self.hue
        order = self._order(draws[:, :4])
        for step in range(order.shape[1]):
            kind = order[:, step]
            images = _adjust_color(images, kind, factors.gather(1, kind.clamp_max(2)[:, None])[:, 0])
            if self.hue and images.shape[1] == 3:
                images = torch.where((kind == 3)[:, None, None, None], _shift_hue(images, turns), images)
        return images

    def _order(self, draws: Tensor) -> Tensor:
        """Return which change (0 to 3) comes when, ``(batch, changes)``: only those that do something."""
        used = [place for place, most in enumerate((self.brightness, self.contrast, self.saturation, self.hue)) if most]
        return torch.tensor(used, dtype=torch.int64, device=draws.device)[draws[:, : len(used)].argsort(dim=1)]


@dataclass(frozen=True)
class Normalize:
    """Subtracts each channel's ``mean`` and divides by its ``std``, both for pixels from 0 to 1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_random = 0

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not all(value > 0 for value in self.std):
            raise ConfigError(
                f"Normalize: mean is {self.mean} and std {self.std}; a number a channel each, std above 0"
            )

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:  # noqa: ARG002
        """Return ``images`` of about mean 0 and deviation 1."""
        mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (images - mean).div_(std)


def _randint_below(draws: Tensor, limit: Tensor | int) -> Tensor:
    """Return whole numbers from 0 to ``limit - 1``, as int64 where ``limit`` is a number, else in its type."""
    if isinstance(limit, int):
        return (draws * limit).long().clamp_max(limit - 1)
    return torch.minimum((draws * limit).floor(), limit - 1)


def _resampling(start: Tensor, length: Tensor, inputs: int, outputs: int) -> Tensor:
    """Return the matrices ``(batch, outputs, inputs)`` that scale ``length`` pixels from ``start`` to ``outputs`` pixels.

    A triangle as wide as the larger of two pixels' distances, cut off at the box's edges, as Pillow's bilinear filter is.
    """
    scale = (length / outputs)[:, None, None]
    pixels = torch.arange(inputs, device=start.device) + 0.5
    centres = start[:, None, None] + (torch.arange(outputs, device=start.device)[:, None] + 0.5) * scale
    inside = (pixels > start[:, None]) & (pixels < (start + length)[:, None])
    weights = (1 - (pixels - centres).abs() / scale.clamp_min(1)).clamp_min(0) * inside[:, None]
    return weights / weights.sum(dim=2, keepdim=True)


def _adjust_color(images: Tensor, kind: Tensor, factor: Tensor) -> Tensor:
    """Blend each image with black (kind 0), its mean grey (1) or its grey self (2); of another kind it stays as it is.

    Each is a matrix over the channels and a number added, so that the images are gone through twice and not ten times.
    """
    batch, channels = images.shape[:2]
    weights = images.new_tensor([0.2989, 0.587, 0.114] if channels == 3 else [1.0])
    factor = torch.where(kind == 3, 1.0, factor)
    to_grey = torch.where(kind == 2, 1 - factor, 0.0)[:, None, None] * weights.expand(channels, channels)
    matrix = factor[:, None, None] * torch.eye(channels, device=images.device) + to_grey
    pixels = images.reshape(batch, channels, -1)
    grey = torch.where(kind == 1, (1 - factor) * (pixels.mean(dim=2) @ weights), 0.0)
    return torch.baddbmm(grey[:, None, None], matrix, pixels).clamp_(0, 1).view_as(images)


def _shift_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Return ``images (batch, 3, ...)`` with their hues turned by ``turns`` of the circle."""
    red, green, blue = images.unbind(1)
    most, least = images.amax(1), images.amin(1)
    span = most - least
    divisor = torch.where(span == 0, 1.0, span)
    hue = torch.where(most == red, (green - blue) / divisor, 4 + (red - green) / divisor)
    hue = torch.where((most == green) & (most != red), 2 + (blue - red) / divisor, hue)
    hue = (hue / 6 + turns[:, None, None]) % 1
    place = (images.new_tensor([5.0, 3.0, 1.0])[:, None, None] + 6 * hue[:, None]) % 6
    return most[:, None] - span[:, None] * torch.minimum(place, 4 - place).clamp(0, 1)
