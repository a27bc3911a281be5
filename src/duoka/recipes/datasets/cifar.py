"""CIFAR-10 and CIFAR-100 in the official python format: the downloaded archive, or the folder unpacked from it."""

from __future__ import annotations

import io
import pickle
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from duoka.errors import DataError
from duoka.recipes.datasets.download import check, fetch, refuse_file
from duoka.recipes.datasets.images import Images, ImageSet
from duoka.utils.imports import import_optional

__all__ = ["CifarArchive", "load", "official"]

SHAPE = (3, 32, 32)
ARCHIVE_BYTES = {"cifar10": 170_498_071, "cifar100": 169_001_437}


@dataclass(frozen=True)
class CifarArchive:
    """Where a set comes from and what its files are called; checksums are MD5."""

    name: str
    url: str
    size: int
    """The archive's bytes."""
    md5: str
    """The archive's checksum."""
    folder: str
    """The folder that the archive holds."""
    train: tuple[tuple[str, str], ...]
    """Files for training and their checksums."""
    test: tuple[tuple[str, str], ...]
    meta: tuple[str, str]
    """The file of the classes' names, and its checksum."""
    names_key: str
    labels_key: str

    @property
    def archive(self) -> str:
        """The archive's file name."""
        return self.url.rpartition("/")[2]


def official(name: str) -> CifarArchive:
    """Return the source of ``"cifar10"`` or ``"cifar100"``, with the addresses and checksums that torchvision keeps."""
    known = getattr(import_optional("torchvision.datasets", extra="vision"), name.upper())
    train, test = (tuple((file, md5) for file, md5 in files) for files in (known.train_list, known.test_list))
    meta = (known.meta["filename"], known.meta["md5"])
    labels = "fine_labels" if name == "cifar100" else "labels"
    size, folder, names = ARCHIVE_BYTES[name], known.base_folder, known.meta["key"]
    return CifarArchive(name, known.url, size, known.tgz_md5, folder, train, test, meta, names, labels)


def load(source: CifarArchive, root: str | Path, *, download: bool = True, verify: bool = True) -> ImageSet:
    """Read a set from ``root``, where the archive or the unpacked folder lies, downloading the archive if neither does.

    Args:
        source: what ``official`` returns.
        root: the folder that holds the archive or the unpacked folder.
        download: whether the archive may be downloaded.
        verify: whether files must have the official checksums; off for other data in the same format.

    Raises:
        DataError: a file is missing, truncated or changed; the message names it, what was expected, and the remedy.

    """
    root = Path(root)
    refuse_file(root)
    unpacked = root / source.folder
    archive = root / source.archive
    if unpacked.is_dir():
        read = _from_folder(source, unpacked, verify)
    else:
        if not archive.exists():
            _fetch(source, archive, download)
        if verify:
            check(archive, size=source.size, md5=source.md5, remedy=f"delete it and {_again(source)}")
        read = _from_archive(source, archive)
    names = _unpickle(read(source.meta[0]), unpacked / source.meta[0]).get(source.names_key)
    if not isinstance(names, list):
        raise DataError(f"{unpacked / source.meta[0]} has no list {source.names_key!r}: it is not the official file")
    classes = tuple(_text(name) for name in names)
    train, test = (
        _images(source, [(read(file), unpacked / file) for file, _ in files], len(classes))
        for files in (source.train, source.test)
    )
    return ImageSet(source.name, classes, train, test)


def _again(source: CifarArchive) -> str:
    """Say how to get the archive anew."""
    return f"start again to download it anew, or fetch {source.url}"


def _fetch(source: CifarArchive, archive: Path, download: bool) -> None:
    """Download the archive where that is allowed."""
    if not download:
        remedy = f"allow it with --download true, or fetch {source.url}"
        raise DataError(
            f"neither {archive.parent / source.folder} nor {archive} is there, and download is off: {remedy}"
        )
    fetch(source.url, archive, size=source.size, md5=source.md5)


def _from_folder(source: CifarArchive, folder: Path, verify: bool) -> Callable[[str], bytes]:
    """Return what reads a file of the unpacked folder."""
    checksums = dict((*source.train, *source.test, source.meta))
    remedy = f"unpack {source.archive} again, or delete {folder} and {_again(source)}; for other data, --verify false"

    def read(name: str) -> bytes:
        if not (folder / name).is_file():
            raise DataError(f"{folder / name} is missing, the folder was not unpacked completely: {remedy}")
        if verify:
            check(folder / name, size=None, md5=checksums[name], remedy=remedy)
        return (folder / name).read_bytes()

    return read


def _from_archive(source: CifarArchive, archive: Path) -> Callable[[str], bytes]:
    """Return what reads a file of the archive; it is decompressed once."""
    try:
        with tarfile.open(archive, "r:gz") as tar:
            contents = {entry.name: file.read() for entry in tar if (file := tar.extractfile(entry)) is not None}
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        found = f"{archive} ({archive.stat().st_size:,} bytes, the official one has {source.size:,})"
        raise DataError(f"{found} is truncated or no archive: {error}: delete it and {_again(source)}") from error

    def read(name: str) -> bytes:
        path = f"{source.folder}/{name}"
        if path not in contents:
            raise DataError(f"{archive} holds no {path}: is it {source.name}? Delete it and {_again(source)}")
        return contents[path]

    return read


def _images(source: CifarArchive, batches: list[tuple[bytes, Path]], classes: int) -> Images:
    """Join the batches of one part; each row of ``data`` is an image, channel by channel."""
    rows, labels = [], []
    for data, path in batches:
        batch = _unpickle(data, path)
        array, numbers = batch.get("data"), batch.get(source.labels_key)
        if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.shape[1:] != (3 * 32 * 32,):
            raise DataError(f"{path} has no 'data' of uint8 rows of 3,072 values: it is not in the official format")
        if not isinstance(numbers, list) or len(numbers) != len(array):
            raise DataError(f"{path} has {len(array)} images, and no list {source.labels_key!r} as long as that")
        if not all(0 <= number < classes for number in numbers):
            raise DataError(f"{path} has the label {max(numbers)}, and there are {classes} classes")
        rows.append(torch.from_numpy(array))
        labels += numbers
    return Images(torch.cat(rows).view(-1, *SHAPE), torch.tensor(labels, dtype=torch.int64))


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name


def _unpickle(data: bytes, path: Path) -> dict[str, Any]:
    """Return a batch's dictionary with its keys as text, running none of the code that a pickle can name."""
    try:
        batch = _Unpickler(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:
        remedy = "it is truncated or not in the official format; get it anew"
        raise DataError(f"cannot read {path} ({len(data):,} bytes): {error}: {remedy}") from error
    if not isinstance(batch, dict):
        raise DataError(f"{path} holds a {type(batch).__name__}, not the dictionary of the official format")
    return {_text(key): value for key, value in batch.items()}


class _Unpickler(pickle.Unpickler):
    """A reader of numbers, text and arrays only: a pickle from elsewhere could otherwise run any code."""

    ALLOWED = frozenset({"_reconstruct", "ndarray", "dtype", "_frombuffer", "encode"})

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] not in ("numpy", "_codecs") or name not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no image batch needs")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)
