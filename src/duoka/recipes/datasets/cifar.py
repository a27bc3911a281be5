"""CIFAR-10 and CIFAR-100 in the official Python format: the downloaded archive, or the folder unpacked from it.

torchvision's reader is not used: it unpickles without restriction, so a file that is read without its checksum
(``verify=False``) could run code. Its addresses and checksums are used.
"""

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
from duoka.recipes.datasets.download import RemoteFile, data_folder, verify_md5
from duoka.recipes.datasets.images import Images, ImageSet
from duoka.utils.imports import import_optional

Batch = dict[str, Any]
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

    @property
    def files(self) -> tuple[tuple[str, str], ...]:
        """Names and checksums of all files."""
        return *self.train, *self.test, self.meta


def official(name: str) -> CifarArchive:
    """Return the archive of ``"cifar10"`` or ``"cifar100"``, with torchvision's addresses and checksums."""
    known = getattr(import_optional("torchvision.datasets", extra="vision"), name.upper())
    return CifarArchive(
        known.url,
        ARCHIVE_BYTES[name],
        known.tgz_md5,
        name,
        known.base_folder,
        train=tuple(map(tuple, known.train_list)),
        test=tuple(map(tuple, known.test_list)),
        meta=(known.meta["filename"], known.meta["md5"]),
        names_key=known.meta["key"],
        labels_key="fine_labels" if name == "cifar100" else "labels",
    )


def load(source: CifarArchive, root: str | Path, *, download: bool = True, verify: bool = True) -> ImageSet:
    """Read a set from ``root``, which holds the archive or the unpacked folder; download the archive if neither exists.

    ``verify`` requires the official checksums; turn it off for other data in the same format. Raises DataError if a file
    is missing, truncated or changed.
    """
    root = data_folder(root)
    folder = root / source.folder
    if folder.is_dir():
        batches = _read_folder(source, folder, verify)
    else:
        missing = f"neither {folder} nor {root / source.file_name} is there"
        batches = _read_archive(source, source.locate(root, download=download, verify=verify, missing=missing))
    names = batches[source.meta[0]].get(source.names_key)
    if not isinstance(names, list):
        raise DataError(f"{folder / source.meta[0]} has no list {source.names_key!r}: it is not the official file")
    classes = tuple(_text(name) for name in names)
    train, test = (
        _join_batches(source, {folder / name: batches[name] for name, _ in files}, len(classes))
        for files in (source.train, source.test)
    )
    return ImageSet(source.name, classes, train, test)


def _read_folder(source: CifarArchive, folder: Path, verify: bool) -> dict[str, Batch]:
    remedy = f"unpack {source.file_name} again, or delete {folder} and start again; for other data, --verify false"
    batches = {}
    for name, md5 in source.files:
        path = folder / name
        if not path.is_file():
            raise DataError(f"{path} is missing, the folder was not unpacked completely: {remedy}")
        data = path.read_bytes()
        if verify:
            verify_md5(io.BytesIO(data), path, md5, remedy=remedy)
        batches[name] = _unpickle(data, path)
    return batches


def _read_archive(source: CifarArchive, archive: Path) -> dict[str, Batch]:
    try:
        with tarfile.open(archive, "r:gz") as tar:
            found = {entry.name: member.read() for entry in tar if (member := tar.extractfile(entry)) is not None}
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        size = f"{archive.stat().st_size:,} bytes, the official one has {source.size:,}"
        raise DataError(f"{archive} ({size}) is truncated or no archive: {error}: {source.refetch}") from error
    paths = {name: f"{source.folder}/{name}" for name, _ in source.files}
    if missing := [path for path in paths.values() if path not in found]:
        raise DataError(f"{archive} holds no {missing[0]}: is it {source.name}? {source.refetch}")
    return {name: _unpickle(found[path], archive / path) for name, path in paths.items()}


def _join_batches(source: CifarArchive, batches: dict[Path, Batch], num_classes: int) -> Images:
    """Join batches; each row of a batch's ``data`` is an image, channel by channel."""
    rows, labels = [], []
    for path, batch in batches.items():
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


def _unpickle(data: bytes, path: Path) -> Batch:
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
