"""Batch transforms compared with torchvision's: equal images for equal choices, equal distributions."""

import pytest
import torch
from scipy.stats import ks_2samp, kstest
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from duoka.data import transforms
from duoka.data.counter_rng import counter_uniform
from duoka.errors import ConfigError

CERTAIN = 1e-3
"""Seeds are fixed, so a test that passes always does; one of a thousand distributions that agree would be taken to differ."""


def numbers(count: int, draws: int, seed: int = 0) -> torch.Tensor:
    return counter_uniform(seed, torch.arange(count), draws)


def images(count: int = 6, side: int = 16, channels: int = 3) -> torch.Tensor:
    """Smooth images, as photographs are: noise would hide an error of half a pixel, and show rounding."""
    small = torch.rand(count, channels, 4, 4, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.interpolate(small, side, mode="bicubic").clamp(0, 1)


def test_numbers_are_uniform_and_independent_of_each_other():
    drawn = numbers(4000, 6, seed=-5)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert kstest(drawn.flatten().numpy(), "uniform").pvalue > CERTAIN
    assert torch.corrcoef(drawn.T).fill_diagonal_(0).abs().max() < 0.06
    shifted = torch.stack([drawn[:-1, 0], drawn[1:, 0], numbers(4000, 6, seed=-4)[1:, 0]])
    assert torch.corrcoef(shifted).fill_diagonal_(0).abs().max() < 0.06


def test_a_place_has_the_same_numbers_in_any_batch():
    whole = numbers(100, 3, seed=2**64 - 1)
    assert torch.equal(counter_uniform(2**64 - 1, torch.tensor([99, 7]), 3), whole[[99, 7]])


def test_a_box_is_cut_out_and_scaled_as_torchvision_does():
    crop = transforms.RandomResizedCrop(12, scale=(0.1, 1.0))
    source, draws = images(40, 32), numbers(40, crop.num_random)
    boxes = torch.stack(crop.boxes(draws, 32, 32), 1).int().tolist()
    expected = [F.resized_crop(image, *box, [12, 12], antialias=True) for image, box in zip(source, boxes, strict=True)]
    assert torch.allclose(crop(source, draws), torch.stack(expected), atol=1e-5)


@pytest.mark.parametrize(("shape", "scale", "ratio"), [
    ((64, 64), (0.08, 1.0), (3 / 4, 4 / 3)),
    ((64, 64), (0.8, 1.0), (3 / 4, 4 / 3)),
    ((30, 60), (0.5, 1.0), (0.9, 1.1)),
    ((60, 30), (0.9, 1.0), (0.9, 1.1)),
])  # fmt: skip
def test_boxes_are_distributed_as_torchvisions_are(shape, scale, ratio):
    crop = transforms.RandomResizedCrop(64, scale=scale, ratio=ratio)
    ours = torch.stack(crop.boxes(numbers(2000, crop.num_random), *shape), 1)
    theirs_of, blank = v2.RandomResizedCrop(64, scale=scale, ratio=ratio), torch.zeros(3, *shape)
    torch.manual_seed(0)
    theirs = [theirs_of.make_params([blank]) for _ in range(2000)]
    for column, name in enumerate(("top", "left", "height", "width")):
        assert ks_2samp(ours[:, column].numpy(), [each[name] for each in theirs]).pvalue > CERTAIN, name
    top, left, height, width = ours.unbind(1)
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= shape[0]).all()
    assert (left + width <= shape[1]).all()


def test_a_crop_takes_every_place_equally_often_and_pads_with_black():
    crop, number = transforms.RandomCrop(4, padding=2), 5000
    source = torch.arange(1.0, 17).view(1, 1, 4, 4).expand(number, 1, 4, 4)
    cropped = crop(source, numbers(number, 2))
    padded = torch.nn.functional.pad(source[:1], [2] * 4)[0, 0]
    windows = {tuple(padded[t : t + 4, x : x + 4].flatten().tolist()): 0 for t in range(5) for x in range(5)}
    for image in cropped:
        windows[tuple(image.flatten().tolist())] += 1  # a KeyError would be a crop that is none
    expected = number / 25
    assert sum((count - expected) ** 2 / expected for count in windows.values()) < 51.2  # chi-square, 24 degrees, 0.001


def test_a_flip_mirrors_its_share_of_the_images_and_nothing_else():
    source = images(2000, 6)
    flipped = transforms.RandomHorizontalFlip(0.3)(source, numbers(2000, 1))
    mirrored = (flipped == source.flip(-1)).flatten(1).all(1)
    assert ((flipped == source).flatten(1).all(1) | mirrored).all()
    assert mirrored.float().mean() == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)])
def test_colours_change_as_torchvision_changes_them_in_any_order(order, channels):
    jitter = transforms.ColorJitter(0.4, 0.3, 0.5, 0.2)
    factors = {0: 1.3, 1: 0.75, 2: 1.4, 3: -0.12}
    draws = torch.zeros(6, 8)
    draws[:, list(order)] = torch.tensor([0.1, 0.2, 0.3, 0.4])
    draws[:, 4:] = torch.tensor([(1.3 - 0.6) / 0.8, (0.75 - 0.7) / 0.6, (1.4 - 0.5) / 1.0, (-0.12 / 0.2 + 1) / 2])
    expected = images(channels=channels)
    change = {0: F.adjust_brightness, 1: F.adjust_contrast, 2: F.adjust_saturation, 3: F.adjust_hue}
    for kind in order:
        expected = torch.stack([change[kind](image, factors[kind]) for image in expected])
    assert torch.allclose(jitter(images(channels=channels), draws), expected, atol=2e-5)


@pytest.mark.parametrize("options", [(0.2, 0.2, 0.2, 0.0), (0.5, 0.0, 0.8, 0.1)])
def test_changed_colours_are_distributed_as_torchvisions_are(options):
    source = images(1, 8).expand(1500, 3, 8, 8)
    ours = transforms.ColorJitter(*options)(source, numbers(1500, 8))
    theirs_of = v2.ColorJitter(*options)
    torch.manual_seed(0)
    theirs = torch.stack([theirs_of(image) for image in source])
    for channel in range(3):
        for place in ((0, 0), (3, 5)):
            pair = (batch[:, channel, *place].numpy() for batch in (ours, theirs))
            assert ks_2samp(*pair).pvalue > CERTAIN


def test_normalising_is_torchvisions():
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    assert torch.allclose(
        transforms.Normalize(mean, std)(images(), torch.empty(6, 0)), F.normalize(images(), mean, std)
    )


def test_a_chain_is_distributed_as_torchvisions():
    ours_of = [
        transforms.RandomResizedCrop(8, (0.5, 1)),
        transforms.RandomHorizontalFlip(),
        transforms.ColorJitter(0.2, 0.2, 0.2),
    ]
    theirs_of = v2.Compose(
        [v2.RandomResizedCrop(8, (0.5, 1)), v2.RandomHorizontalFlip(), v2.ColorJitter(0.2, 0.2, 0.2)]
    )
    source = images(1, 16).expand(1000, 3, 16, 16)
    ours = transforms.apply(ours_of, source, numbers(1000, sum(each.num_random for each in ours_of)))
    torch.manual_seed(0)
    theirs = torch.stack([theirs_of(image) for image in source])
    for place in ((0, 0, 0), (1, 4, 4), (2, 7, 3)):
        assert ks_2samp(ours[:, *place].numpy(), theirs[:, *place].numpy()).pvalue > CERTAIN


@pytest.mark.parametrize("wrong", [
    lambda: transforms.RandomHorizontalFlip(1.5),
    lambda: transforms.RandomCrop(0),
    lambda: transforms.RandomCrop(9)(images(1, 8), torch.zeros(1, 2)),
    lambda: transforms.RandomResizedCrop(8, scale=(1.0, 0.5)),
    lambda: transforms.ColorJitter(brightness=-1),
    lambda: transforms.ColorJitter(hue=0.6),
    lambda: transforms.ColorJitter(0.1)(images(1, 8, 2), torch.zeros(1, 8)),
    lambda: transforms.Normalize((0.5,), (0.0,)),
])  # fmt: skip
def test_invalid_options_are_refused_with_their_value(wrong):
    with pytest.raises(ConfigError, match=r" (is|are|have|of) "):
        wrong()
