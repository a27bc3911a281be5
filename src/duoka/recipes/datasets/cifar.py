"""CIFAR-10 and CIFAR-100 in the official Python format: the downloaded archive, or the folder unpacked from it.

torchvision's reader is not used: it unpickles without restriction, so a file that is read without its checksum
(``verify=False``) could run code. Its addresses and checksums are used.
"""

from __future__ import annotations

import io
import pickle
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from duoka.errors import DataError
from duoka.recipes.datasets.download import RemoteFile, reject_archive, verify_md5
from duoka.recipes.datasets.images import Images, ImageSet
from duoka.utils.imports import import_optional

SHAPE = (3, 32, 32)
ARCHIVE_BYTES = {"cifar10": 170_498_071, "cifar100": 169_001_437}


@dataclass(frozen=True)
class CifarArchive(RemoteFile):
    """The archive of a set and the files in it."""

    name: str
    folder: str
    """The folder that the archive holds."""
    train: tuple[tuple[str, str], ...]
    """Names and MD5 checksums of the training files."""
    test: tuple[tuple[str, str], ...]
    meta: tuple[str, str]
    """The file of the class names, and its checksum."""
    names_key: str
    labels_key: str


def official(name: str) -> CifarArchive:
    """Return the archive of ``"cifar10"`` or ``"cifar100"``, with torchvision's addresses and checksums."""
    known = getattr(import_optional("torchvision.datasets", extra="vision"), name.upper())
    train, test = (tuple((file, md5) for file, md5 in files) for files in (known.train_list, known.test_list))
    meta = (known.meta["filename"], known.meta["md5"])
    labels_key = "fine_labels" if name == "cifar100" else "labels"
    size, names_key = ARCHIVE_BYTES[name], known.meta["key"]
    return CifarArchive(
        known.url, size, known.tgz_md5, name, known.base_folder, train, test, meta, names_key, labels_key
    )


def load(source: CifarArchive, root: str | Path, *, download: bool = True, verify: bool = True) -> ImageSet:
    """Read a set from ``root``, which holds the archive or the unpacked folder; download the archive if neither exists.

    ``verify`` requires the official checksums; turn it off for other data in the same format. Raises DataError if a file
    is missing, truncated or changed.
    """
    root = Path(root)
    reject_archive(root)
    folder = root / source.folder
    contents = (
        _read_folder(source, folder, verify) if folder.is_dir() else _read_archive(source, root, download, verify)
    )
    meta = folder / source.meta[0]
    names = _unpickle(contents[source.meta[0]], meta).get(source.names_key)
    if not isinstance(names, list):
        raise DataError(f"{meta} has no list {source.names_key!r}: it is not the official file")
    classes = tuple(_text(name) for name in names)
    train, test = (
        _join_batches(source, [(contents[name], folder / name) for name, _ in files], len(classes))
        for files in (source.train, source.test)
    )
    return ImageSet(source.name, classes, train, test)


def _read_folder(source: CifarArchive, folder: Path, verify: bool) -> dict[str, bytes]:
    """Return the bytes of each file of the unpacked folder."""
    remedy = f"unpack {source.file_name} again, or delete {folder} and start again; for other data, --verify false"
    contents = {}
    for name, md5 in (*source.train, *source.test, source.meta):
        path = folder / name
        if not path.is_file():
            raise DataError(f"{path} is missing, the folder was not unpacked completely: {remedy}")
        contents[name] = path.read_bytes()
        if verify:
            verify_md5(io.BytesIO(contents[name]), path, md5, remedy=remedy)
    return contents


def _read_archive(source: CifarArchive, root: Path, download: bool, verify: bool) -> dict[str, bytes]:
    """Return the bytes of each file in the archive, which is downloaded if it is missing."""
    archive = root / source.file_name
    if not archive.exists():
        if not download:
            remedy = f"allow it with --download true, or fetch {source.url}"
            raise DataError(f"neither {root / source.folder} nor {archive} is there, and download is off: {remedy}")
        source.download(root)
    elif verify:
        with archive.open("rb") as file:
            verify_md5(file, archive, source.md5, size=source.size, remedy=source.refetch)
    try:
        with tarfile.open(archive, "r:gz") as tar:
            found = {entry.name: member.read() for entry in tar if (member := tar.extractfile(entry)) is not None}
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        size = f"{archive.stat().st_size:,} bytes, the official one has {source.size:,}"
        raise DataError(f"{archive} ({size}) is truncated or no archive: {error}: {source.refetch}") from error
    contents = {}
    for name, _ in (*source.train, *source.test, source.meta):
        path = f"{source.folder}/{name}"
        if path not in found:
            raise DataError(f"{archive} holds no {path}: is it {source.name}? {source.refetch}")
        contents[name] = found[path]
    return contents


def _join_batches(source: CifarArchive, batches: list[tuple[bytes, Path]], num_classes: int) -> Images:
    """Join batches; each row of a batch's ``data`` is an image, channel by channel."""
    rows, labels = [], []
    for data, path in batches:
        batch = _unpickle(data, path)
        array, numbers = batch.get("data"), batch.get(source.labels_key)
        if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.shape[1:] != (3 * 32 * 32,):
            raise DataError(f"{path} has no 'data' of uint8 rows of 3,072 values: it is not in the official format")
        if not isinstance(numbers, list) or len(numbers) != len(array):
            raise DataError(f"{path} has {len(array)} images, and no list {source.labels_key!r} of the same length")
        if not all(0 <= number < num_classes for number in numbers):
            raise DataError(f"{path} has the label {max(numbers)}, and there are {num_classes} classes")
        rows.append(torch.from_numpy(array))
        labels += numbers
    return Images(torch.cat(rows).view(-1, *SHAPE), torch.tensor(labels, dtype=torch.int64))


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name


def _unpickle(data: bytes, path: Path) -> dict[str, Any]:
    """Return a batch's dictionary with its keys as text, without running code that the pickle names."""
    try:
        batch = _BatchUnpickler(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:
        remedy = "it is truncated or not in the official format; get it anew"
        raise DataError(f"cannot read {path} ({len(data):,} bytes): {error}: {remedy}") from error
    if not isinstance(batch, dict):
        raise DataError(f"{path} holds a {type(batch).__name__}, not the dictionary of the official format")
    return {_text(key): value for key, value in batch.items()}


class _BatchUnpickler(pickle.Unpickler):
    """Unpickler of numbers, text and arrays only, because an unrestricted one runs code that the file names."""

    ALLOWED = frozenset({"_reconstruct", "ndarray", "dtype", "_frombuffer", "encode"})

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] not in ("numpy", "_codecs") or name not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no image batch needs")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)
