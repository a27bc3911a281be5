"""Five convolutional networks for 64x64 images that import only torch, not duoka.

``duoka train tiny-imagenet`` copies this file into every run's folder, as ``model.py``.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class SqueezeExcite(nn.Module):
    """Scales each channel by a function of all channels' means (Hu et al., 2018, https://arxiv.org/abs/1709.01507)."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.scale = nn.Sequential(
            nn.Linear(channels, channels // reduction, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(channels // reduction, channels, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Return ``features (batch, channels, height, width)``, scaled."""
        scales: Tensor = self.scale(features.mean(dim=(2, 3)))
        return features * scales[:, :, None, None]


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, 1x1 where the shape changes (He et al., 2015)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, features: Tensor) -> Tensor:
        """Return ``(batch, outputs, height / stride, width / stride)`` for ``(batch, inputs, height, width)``."""
        return torch.relu(self.layers(features) + self.shortcut(features))


def baseline(num_classes: int = 200, image_size: int = 64) -> nn.Sequential:
    """Five 3x3 convolutions, max-pool and dropout 0.3 after the first, second and fifth; three linear layers."""
    return _five_convolutions(num_classes, image_size, has_attention=False)


def se_attention(num_classes: int = 200, image_size: int = 64) -> nn.Sequential:
    """Return the baseline with batch norm, and squeeze-and-excitation after each convolution."""
    return _five_convolutions(num_classes, image_size, has_attention=True)


def residual(num_classes: int = 200, image_size: int = 64) -> nn.Sequential:  # noqa: ARG001
    """One convolution, four residual blocks of stride 2, global average pooling, one linear layer."""
    widths = (64, 128, 256, 512, 512)
    blocks = [ResidualBlock(inputs, outputs, 2) for inputs, outputs in itertools.pairwise(widths)]
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*_convolution(3, widths[0]), *blocks, *head, nn.Linear(widths[-1], num_classes))


def deeper_wider(num_classes: int = 200, image_size: int = 64) -> nn.Sequential:  # noqa: ARG001
    """Two convolutions with batch norm at each of 128 to 1,024 channels, max-pool and dropout 0.2 between."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 128), (128, 256), (256, 512), (512, 1024)):
        between = [nn.MaxPool2d(2), nn.Dropout(0.2)] if layers else []
        layers += [*between, *_convolution(inputs, outputs), *_convolution(outputs, outputs)]
    return nn.Sequential(*layers, *_wide_head(num_classes))


def best(num_classes: int = 200, image_size: int = 64) -> nn.Sequential:  # noqa: ARG001
    """Return four residual blocks up to 1,024 channels, dropout 0.2 between, and the head of ``deeper_wider``."""
    layers: list[nn.Module] = [ResidualBlock(3, 128, 1)]
    for inputs in (128, 256, 512):
        layers += [nn.Dropout(0.2), ResidualBlock(inputs, 2 * inputs, 2)]
    return nn.Sequential(*layers, *_wide_head(num_classes))


MODELS = {network.__name__: network for network in (baseline, residual, deeper_wider, se_attention, best)}


def build(name: str, num_classes: int = 200, image_size: int = 64) -> nn.Sequential:
    """Return network ``name``: images ``(batch, 3, image_size, image_size)`` to logits ``(batch, num_classes)``.

    Only ``baseline`` and ``se_attention`` depend on ``image_size``, a multiple of 8.

    Raises ValueError if there is no such network, or the size is no multiple of 8.

    >>> build("residual", 200)(torch.zeros(2, 3, 64, 64)).shape
    torch.Size([2, 200])
    """
    if name not in MODELS:
        raise ValueError(f"model={name!r} is not valid: it must be one of {', '.join(MODELS)}")
    if image_size < 8 or image_size % 8:
        raise ValueError(f"image_size={image_size} is not valid: it must be a multiple of 8")
    return MODELS[name](num_classes, image_size)


def _five_convolutions(num_classes: int, image_size: int, *, has_attention: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs, pools in ((3, 128, 1), (128, 256, 1), (256, 512, 0), (512, 512, 0), (512, 256, 1)):
        if has_attention:
            layers += [*_convolution(inputs, outputs), SqueezeExcite(outputs)]
        else:
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(inplace=True)]
        layers += [nn.MaxPool2d(2), nn.Dropout(0.3)] if pools else []
    side = image_size // 8
    return nn.Sequential(*layers, nn.Flatten(), *_head((256 * side * side, 512, 256), num_classes))


def _convolution(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


def _head(widths: Sequence[int], num_classes: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU(inplace=True), nn.Dropout(0.5)]
    return [*layers, nn.Linear(widths[-1], num_classes)]


def _wide_head(num_classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), *_head((1024, 512, 256), num_classes)]
