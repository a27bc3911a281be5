"""CIFAR in its official format: reading, checksums, errors and the download."""

import contextlib
import dataclasses
import os
import pickle
import resource
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from duoka.errors import DataError, StorageError
from duoka.recipes.datasets import cifar as cifar_module
from duoka.recipes.datasets.cifar import CifarArchive, load, official
from support.http_server import Served, serve_bytes


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "both"


@pytest.fixture
def unpacked(root: Path, cifar: CifarArchive) -> Path:
    (root / cifar.file_name).unlink()
    return root / cifar.folder


@pytest.fixture
def archive(root: Path, cifar: CifarArchive) -> Path:
    shutil.rmtree(root / cifar.folder)
    return root / cifar.file_name


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    """Return a function that serves bytes under the archive's name until the test ends."""
    with contextlib.ExitStack() as stack:
        yield lambda content, **options: stack.enter_context(serve_bytes(content, "cifar-100-python.tar.gz", **options))


def test_folder_and_archive_give_the_same_images(root, cifar):
    from_folder = load(cifar, root)
    shutil.rmtree(root / cifar.folder)
    from_archive = load(cifar, root)
    assert from_folder.classes == from_archive.classes == ("apple", "bee", "can")
    assert (len(from_folder.train), len(from_folder.test), from_folder.shape) == (12, 6, (3, 32, 32))
    assert torch.equal(from_folder.train.pixels, from_archive.train.pixels)
    assert torch.equal(from_folder.test.labels, from_archive.test.labels)


def test_rows_are_images_channel_by_channel(unpacked, root, cifar):
    with (unpacked / "train").open("rb") as file:
        rows = pickle.load(file)[b"data"]
    assert np.array_equal(load(cifar, root).train.pixels.numpy(), rows.reshape(-1, 3, 32, 32))


def test_batches_are_joined_in_order(unpacked, root, cifar):
    several = dataclasses.replace(cifar, train=(*cifar.train, *cifar.test))
    images = load(several, root)
    assert len(images.train) == 18
    assert torch.equal(images.train.pixels[12:], images.test.pixels)


def test_official_archives_are_the_authors():
    for name, parts in (("cifar10", 5), ("cifar100", 1)):
        source = official(name)
        assert source.url.startswith("https://www.cs.toronto.edu/~kriz/cifar-")
        assert (len(source.train), len(source.test)) == (parts, 1)
    assert official("cifar100").file_name == "cifar-100-python.tar.gz"


def test_missing_data_without_download_name_both_places_and_the_remedy(tmp_path, cifar):
    with pytest.raises(DataError, match=r"cifar-100-python nor .*tar\.gz is there.*--download true"):
        load(cifar, tmp_path / "empty", download=False)
    assert not (tmp_path / "empty").exists()


def test_truncated_archive_names_both_sizes(archive, root, cifar):
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(DataError, match=rf"tar\.gz has {cifar.size - 100:,} bytes, not {cifar.size:,}: delete it"):
        load(cifar, root)


def test_truncated_archive_is_an_error_without_verification_too(archive, root, cifar):
    archive.write_bytes(archive.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"is truncated or no archive.*delete it"):
        load(cifar, root, verify=False)


def test_changed_file_names_both_checksums(unpacked, root, cifar):
    data = bytearray((unpacked / "test").read_bytes())
    data[-50] ^= 1
    (unpacked / "test").write_bytes(data)
    with pytest.raises(DataError, match=rf"test .*MD5 checksum \w+, not {cifar.test[0][1]}: unpack"):
        load(cifar, root)


def test_missing_file_of_the_folder_is_named(unpacked, root, cifar):
    (unpacked / "meta").unlink()
    with pytest.raises(DataError, match="meta is missing, the folder was not unpacked completely: unpack"):
        load(cifar, root)


def test_truncated_batch_is_an_error_without_verification_too(unpacked, root, cifar):
    (unpacked / "train").write_bytes((unpacked / "train").read_bytes()[:1000])
    with pytest.raises(DataError, match=r"cannot read .*train \(1,000 bytes\)"):
        load(cifar, root, verify=False)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({b"data": np.zeros((2, 10), np.uint8), b"fine_labels": [0, 1]}, "rows of 3,072 values"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": [0]}, "has 2 images"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 1]}, "no list 'fine_labels'"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": [0, 3]}, "the label 3, and there are 3 classes"),
        ([1, 2], "holds a list"),
    ],
)
def test_batch_of_another_form_is_an_error(unpacked, root, cifar, batch, message):
    (unpacked / "train").write_bytes(pickle.dumps(batch, protocol=2))
    with pytest.raises(DataError, match=message):
        load(cifar, root, verify=False)


def test_pickle_that_names_code_does_not_run_it(unpacked, root, cifar, tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    (unpacked / "train").write_bytes(pickle.dumps({b"data": Evil()}))
    with pytest.raises(DataError, match="which no image batch needs"):
        load(cifar, root, verify=False)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name", [b"numpy.f2py.__main__\ndtype", b"numpy\nload", b"numpy.core.multiarray\nencode", b"numpy.f2py\nndarray"]
)
def test_only_the_five_names_of_arrays_are_imported(unpacked, root, cifar, name, monkeypatch):
    monkeypatch.setitem(sys.modules, "numpy.f2py.__main__", None)
    (unpacked / "train").write_bytes(b"c" + name + b"\n.")
    with pytest.raises(DataError, match=r"it names numpy.*, which no image batch needs"):
        load(cifar, root, verify=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"c_codecs\nencode\n(\x8c\x01aX\x03\x00\x00\x00hextR.", "text in the encoding 'hex'"),
        (b"]r\xff\xff\xff\x7f.", "holds a list"),  # the index of a memo of 16 GB
        (b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.", "cannot read"),
        (pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": [None, 1]}), "has the label None"),
        (pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": [True, 1]}), "has the label True"),
        (pickle.dumps({b"data": np.zeros((0, 3072), np.uint8), b"fine_labels": []}), "has no images"),
        (pickle.dumps({b"\xff": 1, 7: 2}), "has 7 where a text should be"),
    ],
)
def test_a_pickle_of_another_form_is_an_error_that_takes_little_memory(unpacked, root, cifar, content, message):
    (unpacked / "train").write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=message):
        load(cifar, root, verify=False)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


@pytest.mark.parametrize("names", [b"three", [1, 2, 3], []])
def test_class_names_that_are_no_texts_are_an_error(unpacked, root, cifar, names):
    (unpacked / "meta").write_bytes(pickle.dumps({b"fine_label_names": names}))
    with pytest.raises(DataError, match=r"no list 'fine_label_names'|where a text should be"):
        load(cifar, root, verify=False)


def test_an_archive_that_unpacks_to_very_much_is_an_error(archive, root, cifar, monkeypatch):
    monkeypatch.setattr(cifar_module, "MAX_BYTES", 20_000)
    with pytest.raises(DataError, match="it unpacks to more than 20,000 bytes"):
        load(cifar, root)


def test_a_download_stops_where_the_server_sends_too_much(cifar, serve, tmp_path):
    source = dataclasses.replace(cifar, url=serve(b"x" * (cifar.size + 1)).url)
    with pytest.raises(DataError, match=f"the server sends more than {cifar.size:,} bytes"):
        load(source, tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_a_pipe_in_place_of_a_file_is_refused_at_once(unpacked, root, cifar):
    (unpacked / "test").unlink()
    os.mkfifo(unpacked / "test")
    with pytest.raises(DataError, match="it is a pipe, a socket or a device"):
        load(cifar, root)


def test_arrays_pickled_by_old_and_new_numpy_are_read(unpacked, root, cifar):
    data = (unpacked / "train").read_bytes()
    for old, new in ((b"numpy._core.multiarray", b"numpy.core.multiarray"), (b"", b"")):
        (unpacked / "train").write_bytes(data.replace(old, new) if old else data)
        assert len(load(cifar, root, verify=False).train) == 12


def test_download_is_used_again(archive, cifar, serve, tmp_path):
    source = dataclasses.replace(cifar, url=serve(archive.read_bytes()).url)
    assert len(load(source, tmp_path / "new").train) == 12
    assert [path.name for path in (tmp_path / "new").iterdir()] == [cifar.file_name]
    assert len(load(dataclasses.replace(source, url=cifar.url), tmp_path / "new").train) == 12


@pytest.mark.parametrize("stated", [True, False])
def test_truncated_download_leaves_no_file(archive, cifar, serve, tmp_path, stated):
    half = archive.read_bytes()[: cifar.size // 2]
    source = dataclasses.replace(cifar, url=serve(half, content_length=cifar.size if stated else None).url)
    with pytest.raises(DataError, match=r"cut short|IncompleteRead|cannot download"):
        load(source, tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_download_with_a_wrong_checksum_leaves_no_file(cifar, serve, tmp_path):
    source = dataclasses.replace(cifar, url=serve(b"x" * cifar.size).url)
    with pytest.raises(DataError, match=f"SHA-256 checksum .*not {cifar.sha256}.*start again"):
        load(source, tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_failing_address_is_named_with_a_way_round(cifar, serve, tmp_path):
    for url in (serve(b"gone", status=404).url, "http://127.0.0.1:9/cifar-100-python.tar.gz"):
        with pytest.raises(DataError, match=rf"cannot download {url}: .*put it at .*tar\.gz"):
            load(dataclasses.replace(cifar, url=url), tmp_path / "new")
        assert list((tmp_path / "new").iterdir()) == []


def test_folder_that_cannot_be_created_is_named(archive, cifar, serve, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"cannot use the folder .*choose another --root"):
        load(dataclasses.replace(cifar, url=serve(archive.read_bytes()).url), tmp_path / "file" / "data")


def test_one_of_several_threads_downloads(archive, cifar, serve, tmp_path):
    served = serve(archive.read_bytes())
    source = dataclasses.replace(cifar, url=served.url)
    threads = [threading.Thread(target=load, args=(source, tmp_path / "new")) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(served.requests) == 1
