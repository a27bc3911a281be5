"""Tiny-ImageNet: the official folders read, packed once, checked against the files, and fetched when absent."""

import dataclasses
import functools
import hashlib
import os
import shutil
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from duoka.errors import DataError
from duoka.recipes.datasets import image_cache, tiny_imagenet
from duoka.recipes.datasets.images import statistics_of
from duoka.recipes.datasets.tiny_imagenet import Archive, load

REAL = Path(__file__).parents[4] / "shared" / "data" / "tiny-imagenet-10.tar"
PACK = ".duoka-64px.pack"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A set like the official one with three classes, 4 training and 2 validation images each; every third is grey."""
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


def decodings(monkeypatch) -> list[str]:
    """Count what is decoded from now on."""
    seen: list[str] = []
    real = image_cache.read_image
    monkeypatch.setattr(image_cache, "read_image", lambda path, shape: (seen.append(str(path)), real(path, shape))[1])
    return seen


def test_images_labels_and_names_are_those_of_the_folder(root, folder):
    images = load(root)
    assert images.classes == ("crane (n01)", "crane (n02)", "goldfish")
    assert images.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert images.test.labels.tolist() == [2, 2, 0, 0, 1, 1]
    assert images.shape == (3, 64, 64)
    with Image.open(folder / "train" / "n02" / "images" / "n02_1.JPEG") as picture:
        assert torch.equal(images.train.pixels[5].permute(1, 2, 0), torch.from_numpy(np.array(picture)))
    grey = images.train.pixels[2]
    assert torch.equal(grey[0], grey[1])
    assert torch.equal(grey[0], grey[2])
    assert images.statistics == statistics_of(images.train)


def test_the_set_is_found_above_and_at_its_folder_and_under_another_name(root, folder):
    assert len(load(folder).train) == 12
    folder.rename(root / "small")
    assert len(load(root).test) == 6
    shutil.copytree(root / "small", root / "other")
    with pytest.raises(DataError, match=r"several sets \(other, small\)"):
        load(root)


def test_a_second_start_decodes_a_few_images_and_maps_the_rest(root, folder, monkeypatch):
    monkeypatch.setattr(image_cache, "PROBES", 2)
    first = load(root)
    seen = decodings(monkeypatch)
    second = load(root)
    assert len(seen) == 2
    assert torch.equal(first.train.pixels, second.train.pixels)
    assert second.statistics == first.statistics
    second.train.pixels.zero_()  # a user's own: neither the file nor the next start notices
    assert torch.equal(load(root).train.pixels, first.train.pixels)
    assert not list(folder.glob("*.part"))


@pytest.mark.parametrize("change", ["added", "removed", "replaced", "touched", "labels"])
def test_a_pack_of_other_files_is_made_anew(root, folder, change):
    before = load(root)
    images = folder / "train" / "n01" / "images"
    if change == "added":
        shutil.copy(images / "n01_0.JPEG", images / "n01_9.JPEG")
    elif change == "removed":
        (images / "n01_0.JPEG").unlink()
    elif change == "replaced":
        Image.new("RGB", (64, 64), "red").save(images / "n01_0.JPEG")
    elif change == "touched":
        os.utime(images / "n01_0.JPEG", (1, 1))
    else:
        text = (folder / "val" / tiny_imagenet.ANNOTATIONS).read_text()
        (folder / "val" / tiny_imagenet.ANNOTATIONS).write_text(text.replace("val_0.JPEG\tn03", "val_0.JPEG\tn01"))
    stamp = (folder / PACK).stat().st_mtime_ns
    after = load(root)
    assert (folder / PACK).stat().st_mtime_ns != stamp
    assert len(after.train) == len(before.train) + {"added": 1, "removed": -1}.get(change, 0)
    if change == "replaced":
        assert after.train.pixels[0, 0].float().mean() > 250
    if change == "labels":
        assert after.test.labels[0] == 0


@pytest.mark.parametrize("damage", ["cut", "name", "header", "pixels", "empty"])
def test_a_damaged_pack_is_made_anew_with_a_warning(root, folder, damage, caplog):
    before, pack = load(root).train.pixels.clone(), folder / PACK
    good = pack.read_bytes()
    bad = {
        "cut": good[:-1],
        "name": b"x" + good[1:],
        "header": good[:20] + b"x" * 60 + good[80:],
        "pixels": good[:4096] + bytes(len(good) - 4096),
        "empty": b"",
    }[damage]
    pack.write_bytes(bad)
    assert torch.equal(load(root).train.pixels, before)
    assert "it is made anew" in caplog.text
    assert pack.read_bytes() == good


def test_a_folder_that_cannot_be_written_is_decoded_into_memory(root, folder, caplog):
    (folder / f"{PACK}.part").mkdir()  # in the way, also for root, whom permissions do not stop
    images = load(root)
    assert len(images.train) == 12
    assert images.statistics == statistics_of(images.train)
    assert "kept in memory" in caplog.text
    assert not (folder / PACK).exists()


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
def test_what_is_missing_or_damaged_is_named_with_the_remedy(root, folder, damage, message):
    damage(folder)
    with pytest.raises(DataError, match=message) as caught:
        load(root)
    assert ":" in str(caught.value)
    assert not (folder / PACK).exists()
    assert not list(folder.glob("*.part"))


def test_without_data_and_download_the_message_says_where_to_get_them(tmp_path):
    with pytest.raises(
        DataError, match=r"--download true, or fetch http://cs231n\.stanford\.edu/tiny-imagenet-200\.zip"
    ):
        load(tmp_path, download=False)


@pytest.mark.parametrize(("name", "how"), [("tiny.tar", "tar -xf"), ("tiny.zip", "unzip")])
def test_an_archive_in_place_of_the_folder_is_to_be_unpacked(tmp_path, name, how):
    (tmp_path / name).write_bytes(b"an archive")
    with pytest.raises(DataError, match=rf"{name} is a file, not a folder: unpack it with `{how}"):
        load(tmp_path / name)
    with pytest.raises(DataError, match=rf"unpack {name} there if that is it"):
        load(tmp_path, download=False)


@pytest.fixture
def served(root: Path, folder: Path) -> Iterator[Archive]:
    """The set as an archive on the loopback address, and no longer on disk."""
    with zipfile.ZipFile(root / "t.zip", "w") as packed_file:
        for path in sorted(folder.rglob("*")):
            packed_file.write(path, path.relative_to(root))
        packed_file.writestr("tiny-imagenet-200/test/images/test_0.JPEG", b"without a label")
    content = (root / "t.zip").read_bytes()
    shutil.rmtree(root)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=functools.partial(server.serve_forever, poll_interval=0.01))
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}/tiny-imagenet-200.zip"
    yield Archive(url, len(content), hashlib.md5(content, usedforsecurity=False).hexdigest())
    server.shutdown()
    server.server_close()
    thread.join()


def test_absent_data_are_downloaded_checked_and_unpacked_once(root, served, capfd):
    assert len(load(root, archive=served).train) == 12
    assert "100%" in capfd.readouterr().err or (root / served.name).is_file()
    assert {path.name for path in root.iterdir()} == {served.name, "tiny-imagenet-200"}
    assert not (root / "tiny-imagenet-200" / "test").exists()
    nowhere = dataclasses.replace(served, url="http://127.0.0.1:9/tiny-imagenet-200.zip")
    assert len(load(root, archive=nowhere).train) == 12
    shutil.rmtree(root / "tiny-imagenet-200")
    assert len(load(root, archive=nowhere, download=False).train) == 12


def test_a_download_of_other_bytes_is_refused_and_leaves_nothing(root, served):
    with pytest.raises(DataError, match="MD5"):
        load(root, archive=dataclasses.replace(served, md5="0" * 32))
    assert not list(root.iterdir())


def test_a_truncated_archive_is_refused_before_it_is_unpacked(root, served):
    root.mkdir()
    (root / served.name).write_bytes(b"PK half of it")
    with pytest.raises(DataError, match="delete it and start again"):
        load(root, archive=served)
    assert [path.name for path in root.iterdir()] == [served.name]


@pytest.mark.skipif(not REAL.exists(), reason="needs ../shared/data/tiny-imagenet-10.tar")
def test_the_real_subset_is_read_and_its_later_starts_are_quick(tmp_path):
    with tarfile.open(REAL) as tar:
        tar.extractall(tmp_path, filter="data")
    images = load(tmp_path)
    assert (len(images.train), len(images.test), len(images.classes)) == (2000, 500, 10)
    assert images.train.labels.bincount().tolist() == [200] * 10
    assert images.test.labels.bincount().tolist() == [50] * 10
    assert images.classes[0] == "goldfish"
    began = time.perf_counter()
    again = load(tmp_path)
    assert time.perf_counter() - began < 2
    assert torch.equal(images.train.pixels, again.train.pixels)
    grey = (images.train.pixels[:, 0] == images.train.pixels[:, 1]).flatten(1).all(1)
    assert 0 < grey.sum() < 200, "the subset has grey-scale images"
