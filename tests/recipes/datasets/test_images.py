"""Image files, folders of them, digits, splits, statistics and batches."""

import os
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from duoka.errors import DataError, MissingDependencyError
from duoka.recipes.datasets import image_folder
from duoka.recipes.datasets.images import (
    Collate,
    ImageDataset,
    ImageSet,
    channel_statistics,
    load_digits,
    loader,
    read_image,
    stratified_split,
    write_image,
)
from duoka.recipes.image_classification.presets import CIFAR100
from duoka.utils.imports import import_optional
from support.paths import TINY_IMAGENET, needs_file


def gray_image(path: Path, pixels: np.ndarray) -> Path:
    Image.fromarray(pixels).save(path)
    return path


def test_image_of_the_right_size_is_read_unchanged(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    assert np.array_equal(read_image(gray_image(tmp_path / "a.png", pixels), (1, 8, 8))[0].numpy(), pixels)


def test_invert_swaps_dark_and_light(tmp_path):
    path = gray_image(tmp_path / "a.png", np.full((8, 8), 10, np.uint8))
    assert read_image(path, (1, 8, 8), invert=True).unique().tolist() == [245]


def test_other_sizes_are_scaled_and_cropped_around_the_center(tmp_path):
    wide = np.zeros((16, 64), np.uint8)
    wide[:, 24:40] = 200
    assert read_image(gray_image(tmp_path / "a.png", wide), (1, 8, 8)).float().mean() == pytest.approx(200, abs=12)


def test_gray_becomes_color_and_color_gray(tmp_path):
    path = gray_image(tmp_path / "a.png", np.full((8, 8), 77, np.uint8))
    assert read_image(path, (3, 8, 8)).unique().tolist() == [77]
    Image.new("RGB", (9, 9), (255, 255, 255)).save(tmp_path / "b.jpg")
    assert read_image(tmp_path / "b.jpg", (1, 8, 8)).unique().tolist() == [255]


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
    path = gray_image(tmp_path / "a.png", np.full((8, 8), 0x8080, np.uint16))
    assert read_image(path, (1, 8, 8)).unique().tolist() == [128]


def test_transparent_pixels_are_white(tmp_path):
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", (3, 8, 8)).unique().tolist() == [255]


def test_written_image_is_read_back_unchanged(tmp_path):
    for shape in ((1, 8, 8), (3, 8, 10)):
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        write_image(tmp_path / "deep" / "a.png", pixels)
        assert torch.equal(read_image(tmp_path / "deep" / "a.png", shape), pixels)


def test_missing_and_unreadable_images_are_named(tmp_path):
    with pytest.raises(DataError, match=r"there is no image .*none\.png"):
        read_image(tmp_path / "none.png", (1, 8, 8))
    Image.new("RGB", (50, 50)).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:-300])
    (tmp_path / "text.png").write_text("not an image")
    for name in ("cut.jpg", "text.png"):
        with pytest.raises(DataError, match=rf"cannot read the image .*{name}.*Replace or remove it"):
            read_image(tmp_path / name, (1, 8, 8))


def test_a_file_of_another_format_is_refused_whatever_its_name_is(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(DataError, match=r"a\.png: it is no PNG, JPEG, WEBP, BMP or GIF file"):
        read_image(path, (3, 8, 8))
    for name in ("b.tif", "b.ppm"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
        with pytest.raises(DataError, match="it is no PNG"):
            read_image(tmp_path / name, (3, 8, 8))


@pytest.mark.parametrize("side", [7200, 10_000, 1_000_000])
def test_an_image_of_very_many_pixels_is_refused_before_it_is_decoded(tmp_path, side):
    Image.new("1", (8, 8)).save(tmp_path / "bomb.png")
    content = bytearray((tmp_path / "bomb.png").read_bytes())
    content[16:24] = struct.pack(">II", side, side)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    (tmp_path / "bomb.png").write_bytes(content)
    with pytest.raises(DataError, match=r"bomb\.png has more than 50,000,000 pixels"):
        read_image(tmp_path / "bomb.png", (1, 8, 8))


def test_a_pipe_and_a_name_that_is_too_long_are_no_images(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    for path, reason in ((tmp_path / "a.png", "a pipe"), (tmp_path / ("a" * 300), "too long"), ("a\0", "characters")):
        with pytest.raises(DataError, match=f"cannot read the image .*{reason}"):
            read_image(path, (1, 8, 8))


def test_class_folders_are_split_by_seed_with_some_of_each_class(picture_folder):
    images = image_folder.load(picture_folder, size=16, split_seed=1)
    assert images.classes == ("bright", "dark")
    assert (len(images.train), len(images.test), images.shape) == (16, 4, (3, 16, 16))
    assert images.test.labels.bincount().tolist() == [2, 2]
    bright = images.train.pixels.float().mean(dim=(1, 2, 3)) > 128
    assert torch.equal(bright, images.train.labels == 0)
    again, other = (image_folder.load(picture_folder, size=16, split_seed=seed) for seed in (1, 2))
    assert torch.equal(images.test.pixels, again.test.pixels)
    assert not torch.equal(images.test.pixels, other.test.pixels)


@pytest.mark.parametrize("part", ["test", "val"])
def test_train_and_test_folders_are_kept_apart(picture_folder, part):
    root = picture_folder.parent / "parts"
    root.mkdir()
    picture_folder.rename(root / "train")
    (root / part / "dark").mkdir(parents=True)
    (root / "train" / "dark" / "1.png").rename(root / part / "dark" / "1.png")
    images = image_folder.load(root, size=16)
    assert (len(images.train), images.test.labels.tolist()) == (19, [1])


def test_folders_without_classes_or_images_are_an_error(picture_folder, tmp_path):
    with pytest.raises(DataError, match="there is no folder"):
        image_folder.load(tmp_path / "none")
    with pytest.raises(DataError, match="two at least: found 'pictures' only"):
        image_folder.load(tmp_path)
    (picture_folder / "dark" / "x.png").write_text("no image")
    with pytest.raises(DataError, match=r"cannot read the image .*dark/x\.png"):
        image_folder.load(picture_folder)
    (picture_folder / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty holds no image \(.bmp, .gif"):
        image_folder.load(picture_folder)


def test_class_in_the_test_part_only_is_an_error(picture_folder):
    root = picture_folder.parent / "parts"
    root.mkdir()
    picture_folder.rename(root / "train")
    with pytest.raises(DataError, match="neither test/ nor val/"):
        image_folder.load(root)
    (root / "val" / "odd").mkdir(parents=True)
    with pytest.raises(DataError, match=r"has classes that .* lacks: odd"):
        image_folder.load(root)


@needs_file(TINY_IMAGENET)
def test_real_photographs_in_class_folders_are_read(tmp_path):
    import tarfile

    with tarfile.open(TINY_IMAGENET) as tar:
        members = [entry for entry in tar if "/train/" in f"/{entry.name}" and entry.name.endswith("JPEG")][::20]
        tar.extractall(tmp_path, members, filter="data")
    (train,) = tmp_path.rglob("train")
    images = image_folder.load(train, size=32)
    assert len(images.train) + len(images.test) == len(members)
    assert images.shape == (3, 32, 32)
    assert 0.3 < channel_statistics(images.train.pixels).mean[0] < 0.6


def test_digits_are_complete_and_split_by_seed_and_class():
    images = load_digits()
    assert len(images.train) + len(images.test) == 1797
    assert images.shape == (1, 8, 8)
    assert (images.train.pixels.min(), images.train.pixels.max()) == (0, 255)
    counts = images.train.labels.bincount() + images.test.labels.bincount()
    share = images.test.labels.bincount() / counts
    assert ((share - 0.2).abs() < 0.01).all()
    assert torch.equal(images.test.pixels, load_digits().test.pixels)
    assert not torch.equal(images.test.labels, load_digits(split_seed=1).test.labels)


def test_split_takes_each_index_once_and_trains_on_every_class():
    labels = torch.tensor([0] * 10 + [1] * 2 + [2])
    train, test = stratified_split(labels, 0.9, seed=0)
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(13))
    assert labels[train].unique().tolist() == [0, 1, 2]
    assert labels[test].unique().tolist() == [0, 1]


def test_statistics_are_those_of_all_pixels():
    pixels = torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels[:, 2] = 7
    found, floats = channel_statistics(pixels), pixels.double() / 255
    assert found.mean == pytest.approx(floats.mean(dim=(0, 2, 3)).tolist())
    assert found.std[:2] == pytest.approx(floats.std(dim=(0, 2, 3), correction=0).tolist()[:2])
    assert found.std[2] == 1  # a constant channel does not become infinite


def test_batches_are_normalized_floats_and_labels():
    images = load_digits()
    everything = next(
        iter(loader(images.train, Collate(channel_statistics(images.train.pixels)), len(images.train), 0))
    )
    assert everything[0].dtype == torch.float32
    assert float(everything[0].mean()) == pytest.approx(0, abs=1e-5)
    assert float(everything[0].std()) == pytest.approx(1, abs=1e-3)
    assert torch.equal(everything[1], images.train.labels)


def augmentation(images: ImageSet) -> v2.Compose:
    """The random transforms of recipe cifar100 for one training image."""
    return v2.Compose(CIFAR100.augmentation(CIFAR100.Config(), images, v2))


def test_crop_shifts_by_the_border_and_digits_are_never_flipped():
    image = torch.zeros(1, 8, 8, dtype=torch.uint8)
    image[0, 3, 2] = 9
    change = augmentation(load_digits())
    places = {tuple(found.tolist()) for _ in range(200) for found in change(image)[0].nonzero()}
    assert places == {(row, column) for row in (2, 3, 4) for column in (1, 2, 3)}


def test_photographs_are_flipped_half_of_the_time(picture_folder):
    images = image_folder.load(picture_folder, size=32)
    change = augmentation(images)
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    image[:, :, :8] = 1
    mirrored = sum(bool(change(image)[0, 16, 20:].any()) for _ in range(300))
    assert 100 < mirrored < 200


def test_evaluation_images_are_not_transformed():
    images = load_digits().test
    assert torch.equal(ImageDataset(images)[5][0], images.pixels[5])


def test_missing_package_names_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.delitem(sys.modules, "sklearn.datasets", raising=False)
    with pytest.raises(MissingDependencyError, match=r"sklearn is needed .*pip install 'duoka\[vision\]'"):
        import_optional("sklearn.datasets", extra="vision")
