"""ResNet-10, 18 and 50 for small images: torchvision's blocks after a 3x3 stem without max-pool."""

from collections import OrderedDict
from typing import Any

from torch import nn

from duoka.utils.imports import import_optional
from duoka.utils.validation import check_choice, invalid_option

LAYERS: dict[str, tuple[str, tuple[int, int, int, int]]] = {
    "resnet10": ("BasicBlock", (1, 1, 1, 1)),
    "resnet18": ("BasicBlock", (2, 2, 2, 2)),
    "resnet50": ("Bottleneck", (3, 4, 6, 3)),
}
"""Model name to its block in torchvision, and the number of blocks of each stage."""


class ResNet(nn.Sequential):
    """A residual network for images of 8 to 64 pixels a side (He et al., 2015, https://arxiv.org/abs/1512.03385).

    Images ``(batch, in_channels, height, width)`` become logits ``(batch, num_classes)``. Parameter
    names are torchvision's. The stem differs: one 3x3 convolution of stride 1 and no max-pool, so a
    32x32 image enters the first stage as 32x32.

    Args:
        block: torchvision's ``BasicBlock`` or ``Bottleneck``.
        layers: number of blocks in each of the four stages.
        num_classes: length of the output.
        in_channels: 1 for gray images, 3 for color.
        width: factor on torchvision's 64, 128, 256 and 512 channels.
    """

    def __init__(
        self, block: Any, layers: tuple[int, int, int, int], num_classes: int, in_channels: int = 3, width: float = 1.0
    ) -> None:
        widths = [max(1, round(64 * width * 2**stage)) for stage in range(4)]
        inputs = [widths[0], *(planes * block.expansion for planes in widths)]
        modules = OrderedDict[str, nn.Module](
            conv1=nn.Conv2d(in_channels, widths[0], kernel_size=3, padding=1, bias=False),
            bn1=nn.BatchNorm2d(widths[0]),
            relu=nn.ReLU(inplace=True),
        )
        for stage in range(4):
            stride = 1 if stage == 0 else 2
            modules[f"layer{stage + 1}"] = _stage(block, inputs[stage], widths[stage], layers[stage], stride)
        modules.update(avgpool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(inputs[-1], num_classes))
        super().__init__(modules)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def resnet(name: str, num_classes: int, in_channels: int = 3, width: float = 1.0) -> ResNet:
    """Build ``"resnet10"``, ``"resnet18"`` or ``"resnet50"``; see ``ResNet`` for the arguments.

    >>> sum(p.numel() for p in resnet("resnet18", num_classes=100).parameters())
    11220132
    """
    check_choice("model", name, tuple(LAYERS))
    if width <= 0:
        raise invalid_option("width", width, "above 0")
    blocks = import_optional("torchvision.models.resnet", extra="vision")
    block, layers = LAYERS[name]
    return ResNet(getattr(blocks, block), layers, num_classes, in_channels, width)


def _stage(block: Any, inputs: int, planes: int, count: int, stride: int) -> nn.Sequential:
    """Return ``count`` blocks; the first takes the stride, with a 1x1 shortcut where the shape changes."""
    outputs = planes * block.expansion
    shortcut = None
    if stride != 1 or inputs != outputs:
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
    rest = [block(outputs, planes) for _ in range(count - 1)]
    return nn.Sequential(block(inputs, planes, stride, shortcut), *rest)
