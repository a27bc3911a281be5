"""Tiny-ImageNet: reading of the official folders, the cache of decoded images, and the download."""

import dataclasses
import hashlib
import os
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from duoka.errors import DataError
from duoka.recipes.datasets import image_cache, images, tiny_imagenet
from duoka.recipes.datasets.download import RemoteFile
from duoka.recipes.datasets.images import channel_statistics
from duoka.recipes.datasets.tiny_imagenet import load
from support.http_server import serve_bytes
from support.paths import TINY_IMAGENET, needs_file

CACHE, HEADER = ".duoka-64px.npy", ".duoka-64px.json"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A set like the official one with three classes, 4 training and 2 validation images each; every third is gray."""
    folder, random = tmp_path / "data" / "tiny-imagenet-200", np.random.default_rng(0)

    def image(path: Path, number: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (64, 64) if number % 3 == 2 else (64, 64, 3)
        Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(path, quality=95)

    wnids, lines = ("n03", "n01", "n02"), []
    for place, wnid in enumerate(wnids):
        for number in range(4):
            image(folder / "train" / wnid / "images" / f"{wnid}_{number}.JPEG", number)
        for number in range(2):
            name = f"val_{2 * place + number}.JPEG"
            image(folder / "val" / "images" / name, number)
            lines.append(f"{name}\t{wnid}\t0\t0\t62\t62\n")
    (folder / "val" / tiny_imagenet.ANNOTATIONS).write_text("".join(lines))
    (folder / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in wnids))
    (folder / "words.txt").write_text("n01\tcrane, bird\nn02\tcrane\nn03\tgoldfish, Carassius auratus\nn99\tother\n")
    return folder.parent


@pytest.fixture
def folder(root: Path) -> Path:
    return root / "tiny-imagenet-200"


def decoded_images(monkeypatch) -> list[str]:
    """Return a list to which each image that is decoded from now on is added."""
    seen: list[str] = []
    real = images.read_image
    monkeypatch.setattr(images, "read_image", lambda path, shape: (seen.append(str(path)), real(path, shape))[1])
    return seen


def test_images_labels_and_names_are_those_of_the_folder(root, folder):
    found = load(root)
    assert found.classes == ("crane (n01)", "crane (n02)", "goldfish")
    assert found.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert found.test.labels.tolist() == [2, 2, 0, 0, 1, 1]
    assert found.shape == (3, 64, 64)
    with Image.open(folder / "train" / "n02" / "images" / "n02_1.JPEG") as picture:
        assert torch.equal(found.train.pixels[5].permute(1, 2, 0), torch.from_numpy(np.array(picture)))
    gray = found.train.pixels[2]
    assert torch.equal(gray[0], gray[1])
    assert torch.equal(gray[0], gray[2])
    assert found.statistics == channel_statistics(found.train.pixels)


def test_set_is_found_below_the_root_at_it_and_by_another_name(root, folder):
    assert len(load(folder).train) == 12
    folder.rename(root / "small")
    assert len(load(root).test) == 6
    shutil.copytree(root / "small", root / "other")
    with pytest.raises(DataError, match=r"several sets \(other, small\)"):
        load(root)


def test_second_run_decodes_a_few_images_and_maps_the_rest(root, folder, monkeypatch):
    monkeypatch.setattr(image_cache, "NUM_CHECKED", 2)
    first = load(root)
    seen = decoded_images(monkeypatch)
    second = load(root)
    assert len(seen) == 2
    assert torch.equal(first.train.pixels, second.train.pixels)
    assert second.statistics == first.statistics
    second.train.pixels.zero_()  # a user's own: neither the file nor the next start notices
    assert torch.equal(load(root).train.pixels, first.train.pixels)
    assert not list(folder.glob("*.part"))


@pytest.mark.parametrize("change", ["added", "removed", "replaced", "touched", "labels"])
def test_cache_of_other_files_is_rebuilt(root, folder, change):
    before = load(root)
    jpegs = folder / "train" / "n01" / "images"
    if change == "added":
        shutil.copy(jpegs / "n01_0.JPEG", jpegs / "n01_9.JPEG")
    elif change == "removed":
        (jpegs / "n01_0.JPEG").unlink()
    elif change == "replaced":
        Image.new("RGB", (64, 64), "red").save(jpegs / "n01_0.JPEG")
    elif change == "touched":
        os.utime(jpegs / "n01_0.JPEG", (1, 1))
    else:
        text = (folder / "val" / tiny_imagenet.ANNOTATIONS).read_text()
        (folder / "val" / tiny_imagenet.ANNOTATIONS).write_text(text.replace("val_0.JPEG\tn03", "val_0.JPEG\tn01"))
    stamp = (folder / CACHE).stat().st_mtime_ns
    after = load(root)
    assert (folder / CACHE).stat().st_mtime_ns != stamp
    assert len(after.train) == len(before.train) + {"added": 1, "removed": -1}.get(change, 0)
    if change == "replaced":
        assert after.train.pixels[0, 0].float().mean() > 250
    if change == "labels":
        assert after.test.labels[0] == 0


@pytest.mark.parametrize("damage", ["cut", "magic", "shape", "pixels", "empty", "other shape", "json", "no json"])
def test_damaged_cache_is_rebuilt_with_a_warning(root, folder, damage, caplog):
    before, cache = load(root).train.pixels.clone(), folder / CACHE
    good, header = cache.read_bytes(), (folder / HEADER).read_bytes()
    bad = {
        "cut": good[:-1],
        "magic": b"x" + good[1:],
        "shape": good[:20] + b"x" * 60 + good[80:],
        "pixels": good[:128] + bytes(len(good) - 128),
        "empty": b"",
        "other shape": good.replace(b"(18, 3, 64, 64)", b"(17, 3, 64, 64)"),
    }
    cache.write_bytes(bad.get(damage, good))
    if damage == "json":
        (folder / HEADER).write_bytes(header[:-5])
    elif damage == "no json":
        (folder / HEADER).unlink()
    assert torch.equal(load(root).train.pixels, before)
    assert ("rebuilding" in caplog.text) == (damage != "no json")
    assert (cache.read_bytes(), (folder / HEADER).read_bytes()) == (good, header)


def test_images_of_a_read_only_folder_stay_in_memory(root, folder, caplog):
    (folder / CACHE).mkdir()  # in the way, also for root, whom permissions do not stop
    found = load(root)
    assert len(found.train) == 12
    assert found.statistics == channel_statistics(found.train.pixels)
    assert "stay in memory" in caplog.text
    assert not (folder / CACHE).is_file()


def test_a_link_at_a_name_that_can_be_guessed_is_not_followed(root, served, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "mine").write_text("mine")
    data = tmp_path / "data"
    data.mkdir()
    (data / ".tiny-imagenet-200.part").symlink_to(tmp_path / "precious")
    served.unpack(data, download=True, missing="missing")
    cache = data / "tiny-imagenet-200" / f"{CACHE}.part"
    cache.symlink_to(tmp_path / "precious" / "mine")
    load(data)
    assert cache.is_symlink()
    assert [(path.name, path.read_text()) for path in (tmp_path / "precious").iterdir()] == [("mine", "mine")]
    assert not list(data.glob(".*.*.part"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f / "train" / "n01"), r"no image of the class n01"),
        (lambda f: (f / "val" / "images" / "val_3.JPEG").unlink(), r"val_3\.JPEG is missing"),
        (lambda f: (f / "val" / "val_annotations.txt").unlink(), r"cannot read .*val_annotations\.txt"),
        (lambda f: (f / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn77\n"), r"line 1: 'n77' is no class"),
        (lambda f: (f / "wnids.txt").write_text("n01\nn01\n"), r"names 1 classes in 2 lines"),
        (lambda f: (f / "train" / "n02" / "images" / "n02_1.JPEG").write_bytes(b"?"), r"cannot read the image .*n02_1"),
        (
            lambda f: os.truncate(f / "train" / "n02" / "images" / "n02_1.JPEG", 900),
            r"n02_1\.JPEG: image file is truncated",
        ),
    ],
    ids=["class", "image", "annotations", "label", "wnids", "jpeg", "truncated"],
)
def test_missing_or_damaged_file_is_named_with_the_remedy(root, folder, damage, message):
    damage(folder)
    with pytest.raises(DataError, match=message) as caught:
        load(root)
    assert ":" in str(caught.value)
    assert not (folder / CACHE).exists()
    assert not list(folder.glob("*.part"))


def test_missing_data_without_download_are_an_error_with_their_address(tmp_path):
    with pytest.raises(
        DataError, match=r"--download true, or fetch https://cs231n\.stanford\.edu/tiny-imagenet-200\.zip"
    ):
        load(tmp_path, download=False)


@pytest.mark.parametrize(("name", "how"), [("tiny.tar", "tar -xf"), ("tiny.zip", "unzip")])
def test_archive_in_place_of_the_folder_is_an_error(tmp_path, name, how):
    (tmp_path / name).write_bytes(b"an archive")
    with pytest.raises(DataError, match=rf"{name} is a file, not a folder: unpack it with `{how}"):
        load(tmp_path / name)
    with pytest.raises(DataError, match=rf"unpack {name} there if that is it"):
        load(tmp_path, download=False)


@pytest.fixture
def served(root: Path, folder: Path) -> Iterator[RemoteFile]:
    """The set as an archive on the loopback address, and no longer on disk."""
    with zipfile.ZipFile(root / "t.zip", "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(root))
        archive.writestr("tiny-imagenet-200/test/images/test_0.JPEG", b"without a label")
    content = (root / "t.zip").read_bytes()
    shutil.rmtree(root)
    with serve_bytes(content, "tiny-imagenet-200.zip") as server:
        yield RemoteFile(server.url, len(content), hashlib.sha256(content).hexdigest())


def test_missing_data_are_downloaded_verified_and_unpacked_once(root, served):
    assert len(load(root, archive=served).train) == 12
    assert (root / served.file_name).is_file()
    assert {path.name for path in root.iterdir()} == {served.file_name, "tiny-imagenet-200"}
    assert not (root / "tiny-imagenet-200" / "test").exists()
    nowhere = dataclasses.replace(served, url="http://127.0.0.1:9/tiny-imagenet-200.zip")
    assert len(load(root, archive=nowhere).train) == 12
    shutil.rmtree(root / "tiny-imagenet-200")
    assert len(load(root, archive=nowhere, download=False).train) == 12


def test_download_of_other_bytes_leaves_no_file(root, served):
    with pytest.raises(DataError, match="SHA-256"):
        load(root, archive=dataclasses.replace(served, sha256="0" * 64))
    assert not list(root.iterdir())


def test_names_of_classes_stay_in_their_folder(root, folder):
    lines = (folder / "wnids.txt").read_text()
    (folder / "wnids.txt").write_text(f"{lines}../../elsewhere\n")
    with pytest.raises(DataError, match=r"has the line '../../elsewhere', which is no name of a folder"):
        load(root)


def test_truncated_archive_is_an_error_before_it_is_unpacked(root, served):
    root.mkdir()
    (root / served.file_name).write_bytes(b"PK half of it")
    with pytest.raises(DataError, match="delete it and start again"):
        load(root, archive=served)
    assert [path.name for path in root.iterdir()] == [served.file_name]


@needs_file(TINY_IMAGENET)
def test_real_subset_is_read_and_decoded_once(tmp_path, monkeypatch):
    with tarfile.open(TINY_IMAGENET) as tar:
        tar.extractall(tmp_path, filter="data")
    images = load(tmp_path)
    assert (len(images.train), len(images.test), len(images.classes)) == (2000, 500, 10)
    assert images.train.labels.bincount().tolist() == [200] * 10
    assert images.test.labels.bincount().tolist() == [50] * 10
    assert images.classes[0] == "goldfish"
    decoded = decoded_images(monkeypatch)
    again = load(tmp_path)
    assert len(decoded) == image_cache.NUM_CHECKED
    assert torch.equal(images.train.pixels, again.train.pixels)
    gray = (images.train.pixels[:, 0] == images.train.pixels[:, 1]).flatten(1).all(1)
    assert 0 < gray.sum() < 200, "the subset has gray-scale images"
