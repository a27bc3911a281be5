"""ResNets against torchvision's."""

import pytest
import torch
import torchvision

from duoka.errors import ConfigError
from duoka.recipes.models.resnet import LAYERS, ResNet, resnet


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("classes", [10, 100])
def test_parameters_are_torchvisions_apart_from_the_stem(name, classes):
    block, layers = LAYERS[name]
    theirs = torchvision.models.ResNet(getattr(torchvision.models.resnet, block), list(layers), num_classes=classes)
    assert count(resnet(name, classes)) == count(theirs) - 64 * 3 * (7 * 7 - 3 * 3)


def test_resnet18_for_cifar100_has_the_known_number_of_parameters():
    assert count(resnet("resnet18", 100)) == 11_220_132


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_equal_torchvisions_with_the_small_stem(name):
    block, layers = LAYERS[name]
    theirs = torchvision.models.ResNet(getattr(torchvision.models.resnet, block), list(layers), num_classes=7)
    theirs.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
    theirs.maxpool = torch.nn.Identity()
    ours = resnet(name, 7)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours.eval()(images), theirs.eval()(images))


def test_small_gray_digits_fit():
    assert resnet("resnet10", 10, in_channels=1, width=0.25)(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_width_multiplies_every_channel():
    model = resnet("resnet10", 10, width=0.5)
    assert [stage[-1].bn2.num_features for stage in (model.layer1, model.layer2, model.layer3, model.layer4)] == [
        32,
        64,
        128,
        256,
    ]


def test_the_first_stage_gets_the_image_at_full_size():
    model, seen = resnet("resnet10", 10), []
    model.layer1.register_forward_hook(lambda _module, _inputs, output: seen.append(output.shape))
    model(torch.zeros(2, 3, 32, 32))
    assert seen == [(2, 64, 32, 32)]
    assert isinstance(model, ResNet)


@pytest.mark.parametrize(
    ("name", "width", "message"), [("resnet19", 1, "model='resnet19'"), ("resnet10", 0, "width=0")]
)
def test_unknown_models_and_widths_are_rejected(name, width, message):
    with pytest.raises(ConfigError, match=message):
        resnet(name, 10, width=width)
