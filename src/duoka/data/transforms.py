"""Random image transforms on whole batches, with separate random numbers for each image.

A transform takes images, float32 ``(batch, channels, height, width)`` from 0 to 1, and uniform random numbers, float32
``(batch, num_random)``. It returns images, and uses no generator. The distributions are those of torchvision's
transforms of the same names, which work on one image at a time
(https://docs.pytorch.org/vision/stable/transforms.html).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from duoka.errors import ConfigError
from duoka.utils.validation import check_integer, check_number, invalid_option

TRIES = 10
"""How often torchvision draws a box before it takes the center."""


class BatchTransform(Protocol):
    """The interface of the transforms that ``resident`` takes."""

    @property
    def num_random(self) -> int:
        """The number of random numbers per image."""
        ...

    def __call__(self, images: Tensor, uniform: Tensor) -> Tensor:
        """Return ``images``, transformed as the random numbers decide."""
        ...


def apply(transforms: Sequence[BatchTransform], images: Tensor, uniform: Tensor) -> Tensor:
    """Return ``images`` after all ``transforms``; each takes its ``num_random`` columns of ``uniform`` in order."""
    first = 0
    for transform in transforms:
        images = transform(images, uniform[:, first : first + transform.num_random])
        first += transform.num_random
    return images


@dataclass(frozen=True)
class RandomHorizontalFlip:
    """Flips an image horizontally with probability ``p``."""

    p: float = 0.5
    num_random = 1

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise invalid_option("RandomHorizontalFlip: p", self.p, "a probability, 0 to 1")

    def __call__(self, images: Tensor, uniform: Tensor) -> Tensor:
        """Return ``images``, some of them flipped."""
        return torch.where((uniform < self.p)[:, :, None, None], images.flip(-1), images)


@dataclass(frozen=True)
class RandomCrop:
    """Pads an image with ``padding`` black pixels and cuts out ``size`` x ``size`` at a random place."""

    size: int
    padding: int = 0
    num_random = 2

    def __post_init__(self) -> None:
        check_integer("RandomCrop: size", self.size, 1)
        check_integer("RandomCrop: padding", self.padding, 0)

    def __call__(self, images: Tensor, uniform: Tensor) -> Tensor:
        """Return crops ``(batch, channels, size, size)``."""
        padded = functional.pad(images, [self.padding] * 4)
        batch, _, height, width = padded.shape
        if min(height, width) < self.size:
            raise ConfigError(
                f"RandomCrop: size={self.size} is larger than the padded images ({height}x{width} pixels); use a smaller "
                "size or more padding"
            )
        top, left = (
            _randint_below(uniform[:, axis], side - self.size + 1) for axis, side in enumerate((height, width))
        )
        windows = padded.unfold(2, self.size, 1).unfold(3, self.size, 1)
        return windows[torch.arange(batch, device=images.device), :, top, left]


@dataclass(frozen=True)
class RandomResizedCrop:
    """Scales a box of random area and aspect ratio to ``size`` x ``size``, bilinear with antialiasing.

    ``scale`` limits the box's fraction of the area, ``ratio`` its width divided by its height.
    """

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    num_random = 2 * TRIES + 2

    def __post_init__(self) -> None:
        check_integer("RandomResizedCrop: size", self.size, 1)
        for name, limits in (("scale", self.scale), ("ratio", self.ratio)):
            if not 0 < limits[0] <= limits[1]:
                raise invalid_option(f"RandomResizedCrop: {name}", limits, "two numbers above 0, the smaller first")

    def __call__(self, images: Tensor, uniform: Tensor) -> Tensor:
        """Return ``(batch, channels, size, size)``."""
        top, left, height, width = self.boxes(uniform, images.shape[-2], images.shape[-1])
        batch, channels, inputs, across = images.shape
        rows, columns = _resampling(top, height, inputs, self.size), _resampling(left, width, across, self.size)
        wide = torch.bmm(images.reshape(batch, channels * inputs, -1), columns.transpose(1, 2))
        wide = wide.view(batch, channels, inputs, self.size)
        return torch.stack([torch.bmm(rows, channel) for channel in wide.unbind(1)], dim=1)

    def boxes(self, uniform: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return top, left, height and width of a box for each row of ``uniform``, in pixels, each ``(batch,)``."""
        tries = uniform[:, :-2].view(len(uniform), TRIES, 2)
        area = height * width * (self.scale[0] + tries[..., 0] * (self.scale[1] - self.scale[0]))
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        aspect = torch.exp(low + tries[..., 1] * (high - low))
        wide, tall = torch.sqrt(area * aspect).round(), torch.sqrt(area / aspect).round()
        fits = (wide > 0) & (wide <= width) & (tall > 0) & (tall <= height)
        first = fits.int().argmax(dim=1, keepdim=True)  # the first that fits
        center = self._center_size(height, width)
        wide, tall = (
            torch.where(fits.any(1), side.gather(1, first)[:, 0], own)
            for side, own in zip((wide, tall), center, strict=True)
        )
        top, left = _randint_below(uniform[:, -2], height - tall + 1), _randint_below(uniform[:, -1], width - wide + 1)
        top = torch.where(fits.any(1), top, ((height - tall) / 2).floor())
        left = torch.where(fits.any(1), left, ((width - wide) / 2).floor())
        return top, left, tall, wide

    def _center_size(self, height: int, width: int) -> tuple[float, float]:
        """Return width and height of the center box, which is used if no try fits."""
        if width / height < self.ratio[0]:
            return float(width), float(round(width / self.ratio[0]))
        if width / height > self.ratio[1]:
            return float(round(height * self.ratio[1])), float(height)
        return float(width), float(height)


@dataclass(frozen=True)
class ColorJitter:
    """Changes brightness, contrast, saturation and hue by random factors, in a random order for each image.

    Each of the first three is the largest difference of its factor from 1. ``hue``, 0 to 0.5, is the largest turn of
    the color circle.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    num_random = 8  # a place in the order and a factor for each of the four changes

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            check_number(f"ColorJitter: {name}", getattr(self, name))
        if not 0 <= self.hue <= 0.5:
            raise invalid_option("ColorJitter: hue", self.hue, "a fraction of the color circle, 0 to 0.5")

    def __call__(self, images: Tensor, uniform: Tensor) -> Tensor:
        """Return ``images``, gray ``(batch, 1, ...)`` or color ``(batch, 3, ...)``, from 0 to 1."""
        if images.shape[1] not in (1, 3):
            raise ConfigError(
                f"ColorJitter takes gray (1 channel) and color images (3), but these have {images.shape[1]} channels"
            )
        limits = images.new_tensor([self.brightness, self.contrast, self.saturation])
        low = (1 - limits).clamp_min(0)
        factors = low + uniform[:, 4:7] * (1 + limits - low)
        turns = (2 * uniform[:, 7] - 1) * self.hue
        # the changes (0 to 3) in each image's order, ``(batch, changes)``, without those of size 0
        used = [kind for kind, most in enumerate((self.brightness, self.contrast, self.saturation, self.hue)) if most]
        order = torch.tensor(used, dtype=torch.int64, device=uniform.device)[uniform[:, : len(used)].argsort(dim=1)]
        for step in range(order.shape[1]):
            kind = order[:, step]
            images = _adjust_color(images, kind, factors.gather(1, kind.clamp_max(2)[:, None])[:, 0])
            if self.hue and images.shape[1] == 3:
                images = torch.where((kind == 3)[:, None, None, None], _shift_hue(images, turns), images)
        return images


@dataclass(frozen=True)
class Normalize:
    """Subtracts each channel's ``mean`` and divides by its ``std``, for pixels from 0 to 1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_random = 0

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not all(value > 0 for value in self.std):
            raise ConfigError(
                f"Normalize: mean={self.mean} and std={self.std} are not valid: give one number per channel, std above 0"
            )

    def __call__(self, images: Tensor, uniform: Tensor) -> Tensor:  # noqa: ARG002
        """Return ``images`` with a mean near 0 and a deviation near 1."""
        mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (images - mean).div_(std)


def _randint_below(uniform: Tensor, limit: Tensor | int) -> Tensor:
    """Return whole numbers from 0 to ``limit - 1``: int64 for an int ``limit``, else in its dtype."""
    if isinstance(limit, int):
        return (uniform * limit).long().clamp_max(limit - 1)
    return torch.minimum((uniform * limit).floor(), limit - 1)


def _resampling(start: Tensor, length: Tensor, inputs: int, outputs: int) -> Tensor:
    """Return the matrices ``(batch, outputs, inputs)`` that scale ``length`` pixels from ``start`` to ``outputs`` pixels.

    The filter is Pillow's bilinear one: a triangle, as wide as the larger pixel distance, cut off at the box's edges.
    """
    scale = (length / outputs)[:, None, None]
    pixels = torch.arange(inputs, device=start.device) + 0.5
    centers = start[:, None, None] + (torch.arange(outputs, device=start.device)[:, None] + 0.5) * scale
    inside = (pixels > start[:, None]) & (pixels < (start + length)[:, None])
    weights = (1 - (pixels - centers).abs() / scale.clamp_min(1)).clamp_min(0) * inside[:, None]
    return weights / weights.sum(dim=2, keepdim=True)


def _adjust_color(images: Tensor, kind: Tensor, factor: Tensor) -> Tensor:
    """Blend each image with black (kind 0), its mean gray (1) or its gray version (2); other kinds change nothing.

    Each blend is a matrix over the channels plus a number, which takes two passes over the images instead of ten.
    """
    batch, channels = images.shape[:2]
    weights = images.new_tensor([0.2989, 0.587, 0.114] if channels == 3 else [1.0])
    factor = torch.where(kind == 3, 1.0, factor)
    to_gray = torch.where(kind == 2, 1 - factor, 0.0)[:, None, None] * weights.expand(channels, channels)
    matrix = factor[:, None, None] * torch.eye(channels, device=images.device) + to_gray
    pixels = images.reshape(batch, channels, -1)
    gray = torch.where(kind == 1, (1 - factor) * (pixels.mean(dim=2) @ weights), 0.0)
    return torch.baddbmm(gray[:, None, None], matrix, pixels).clamp_(0, 1).view_as(images)


def _shift_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Return ``images (batch, 3, ...)`` with their hues shifted by ``turns`` of the color circle."""
    red, green, blue = images.unbind(1)
    most, least = images.amax(1), images.amin(1)
    span = most - least
    divisor = torch.where(span == 0, 1.0, span)
    hue = torch.where(most == red, (green - blue) / divisor, 4 + (red - green) / divisor)
    hue = torch.where((most == green) & (most != red), 2 + (blue - red) / divisor, hue)
    hue = (hue / 6 + turns[:, None, None]) % 1
    angle = (images.new_tensor([5.0, 3.0, 1.0])[:, None, None] + 6 * hue[:, None]) % 6
    return most[:, None] - span[:, None] * torch.minimum(angle, 4 - angle).clamp(0, 1)
