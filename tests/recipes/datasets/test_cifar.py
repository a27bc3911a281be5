"""CIFAR in its official format: read, checked, and refused with a reason."""

import dataclasses
import functools
import pickle
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from duoka.errors import DataError, StorageError
from duoka.recipes.datasets import cifar as cifar_set
from duoka.recipes.datasets.cifar import CifarArchive, load, official


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "both"


@pytest.fixture
def unpacked(root: Path, cifar: CifarArchive) -> Path:
    (root / cifar.archive).unlink()
    return root / cifar.folder


@pytest.fixture
def archive(root: Path, cifar: CifarArchive) -> Path:
    shutil.rmtree(root / cifar.folder)
    return root / cifar.archive


@pytest.fixture
def serve() -> Iterator:
    """Serve bytes on the loopback address; ``promised`` is the length that the header states."""
    servers = []

    def start(content: bytes, status: int = 200, promised: int | None = None) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(content) if promised is None else promised))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=functools.partial(server.serve_forever, poll_interval=0.01))
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}/cifar-100-python.tar.gz"

    yield start
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join()


def test_the_unpacked_folder_and_the_archive_give_the_same_images(root, cifar):
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


def test_batches_of_cifar10_are_joined_in_their_order(unpacked, root, cifar):
    several = dataclasses.replace(cifar, train=(*cifar.train, *cifar.test))
    images = load(several, root)
    assert len(images.train) == 18
    assert torch.equal(images.train.pixels[12:], images.test.pixels)


def test_the_official_sources_are_those_of_the_authors():
    for name, parts in (("cifar10", 5), ("cifar100", 1)):
        source = official(name)
        assert source.url.startswith("https://www.cs.toronto.edu/~kriz/cifar-")
        assert (len(source.train), len(source.test)) == (parts, 1)
    assert official("cifar100").archive == "cifar-100-python.tar.gz"


def test_nothing_there_and_no_download_names_both_places_and_the_remedy(tmp_path, cifar):
    with pytest.raises(DataError, match=r"cifar-100-python nor .*tar\.gz is there.*--download true"):
        load(cifar, tmp_path / "empty", download=False)
    assert not (tmp_path / "empty").exists()


def test_a_truncated_archive_names_both_sizes(archive, root, cifar):
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(DataError, match=rf"tar\.gz has {cifar.size - 100:,} bytes, not {cifar.size:,}: delete it"):
        load(cifar, root)


def test_a_truncated_archive_is_refused_without_the_check_too(archive, root, cifar):
    archive.write_bytes(archive.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"is truncated or no archive.*delete it"):
        load(cifar, root, verify=False)


def test_a_changed_file_names_both_checksums(unpacked, root, cifar):
    data = bytearray((unpacked / "test").read_bytes())
    data[-50] ^= 1
    (unpacked / "test").write_bytes(data)
    with pytest.raises(DataError, match=rf"test .*MD5 checksum \w+, not {cifar.test[0][1]}: unpack"):
        load(cifar, root)


def test_a_missing_file_of_the_folder_is_named(unpacked, root, cifar):
    (unpacked / "meta").unlink()
    with pytest.raises(DataError, match="meta is missing, the folder was not unpacked completely: unpack"):
        load(cifar, root)


def test_a_truncated_batch_is_refused_without_the_check_too(unpacked, root, cifar):
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
def test_a_batch_of_another_form_is_refused(unpacked, root, cifar, batch, message):
    (unpacked / "train").write_bytes(pickle.dumps(batch, protocol=2))
    with pytest.raises(DataError, match=message):
        load(cifar, root, verify=False)


def test_a_pickle_that_names_code_does_not_run_it(unpacked, root, cifar, tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    (unpacked / "train").write_bytes(pickle.dumps({b"data": Evil()}))
    with pytest.raises(DataError, match="which no image batch needs"):
        load(cifar, root, verify=False)
    assert not (tmp_path / "ran").exists()


def test_arrays_pickled_by_old_and_new_numpy_are_read(unpacked, root, cifar):
    data = (unpacked / "train").read_bytes()
    for old, new in ((b"numpy._core.multiarray", b"numpy.core.multiarray"), (b"", b"")):
        (unpacked / "train").write_bytes(data.replace(old, new) if old else data)
        assert len(load(cifar, root, verify=False).train) == 12


def test_a_download_arrives_whole_and_is_used_again(archive, cifar, serve, tmp_path):
    source = dataclasses.replace(cifar, url=serve(archive.read_bytes()))
    assert len(load(source, tmp_path / "new").train) == 12
    assert [path.name for path in (tmp_path / "new").iterdir()] == [cifar.archive]
    assert len(load(dataclasses.replace(source, url=cifar.url), tmp_path / "new").train) == 12


@pytest.mark.parametrize("promise", [True, False])
def test_a_download_that_is_cut_short_leaves_nothing(archive, cifar, serve, tmp_path, promise):
    half = archive.read_bytes()[: cifar.size // 2]
    source = dataclasses.replace(cifar, url=serve(half, promised=cifar.size if promise else None))
    with pytest.raises(DataError, match=r"cut short|IncompleteRead|cannot download"):
        load(source, tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_a_download_of_something_else_leaves_nothing(cifar, serve, tmp_path):
    source = dataclasses.replace(cifar, url=serve(b"x" * cifar.size))
    with pytest.raises(DataError, match=f"MD5 checksum .*not {cifar.md5}.*start again"):
        load(source, tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_an_address_that_fails_is_named_with_a_way_round(cifar, serve, tmp_path):
    for url in (serve(b"gone", status=404), "http://127.0.0.1:9/cifar-100-python.tar.gz"):
        with pytest.raises(DataError, match=rf"cannot download {url}: .*put it at .*tar\.gz"):
            load(dataclasses.replace(cifar, url=url), tmp_path / "new")
        assert list((tmp_path / "new").iterdir()) == []


def test_a_place_that_is_not_writable_is_named(archive, cifar, serve, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"cannot use the folder .*choose another --root"):
        load(dataclasses.replace(cifar, url=serve(archive.read_bytes())), tmp_path / "file" / "data")


def test_of_several_that_ask_at_once_one_downloads(archive, cifar, serve, tmp_path, monkeypatch):
    source = dataclasses.replace(cifar, url=serve(archive.read_bytes()))
    asked = []
    chunks = cifar_set.fetch.__globals__["_chunks"]
    monkeypatch.setitem(cifar_set.fetch.__globals__, "_chunks", lambda *words: asked.append(words) or chunks(*words))
    threads = [threading.Thread(target=load, args=(source, tmp_path / "new")) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(asked) == 1
