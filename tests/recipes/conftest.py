"""Small real files in the formats that the recipes read."""

import hashlib
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from duoka.recipes.datasets.cifar import CifarArchive


def md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def batch(seed: int, count: int, key: bytes) -> bytes:
    """A batch as the official files have it: bytes as keys, rows of 3,072 bytes, a list of labels."""
    random = np.random.default_rng(seed)
    rows = random.integers(0, 256, (count, 3072), dtype=np.uint8)
    labels = [int(label) for label in random.integers(0, 3, count)]
    return pickle.dumps({b"data": rows, key: labels, b"batch_label": b"a batch"}, protocol=2)


@pytest.fixture
def cifar(tmp_path: Path) -> CifarArchive:
    """A set like CIFAR-100 with 12 and 6 images of 3 classes: its unpacked folder and, beside it, its archive."""
    contents = {
        "train": batch(0, 12, b"fine_labels"),
        "test": batch(1, 6, b"fine_labels"),
        "meta": pickle.dumps({b"fine_label_names": [b"apple", b"bee", b"can"]}, protocol=2),
    }
    folder = tmp_path / "both" / "cifar-100-python"
    folder.mkdir(parents=True)
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    archive = tmp_path / "both" / "cifar-100-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, arcname=folder.name)
    packed = archive.read_bytes()
    sums = {name: md5(data) for name, data in contents.items()}
    return CifarArchive(
        name="cifar100",
        url="http://127.0.0.1:9/cifar-100-python.tar.gz",
        size=len(packed),
        sha256=hashlib.sha256(packed).hexdigest(),
        folder="cifar-100-python",
        train=(("train", sums["train"]),),
        test=(("test", sums["test"]),),
        meta=("meta", sums["meta"]),
        names_key="fine_label_names",
        labels_key="fine_labels",
    )


@pytest.fixture
def picture_folder(tmp_path: Path) -> Path:
    """A folder of bright and dark pictures of several sizes and kinds: ``bright/`` and ``dark/``, 10 each."""
    root = tmp_path / "pictures"
    random = np.random.default_rng(0)
    for name, low in (("bright", 160), ("dark", 0)):
        (root / name).mkdir(parents=True)
        for number in range(10):
            shape = (20 + number, 30) if number % 2 else (24, 24, 3)
            pixels = random.integers(low, low + 90, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.{'png' if number % 3 else 'jpg'}")
    return root
