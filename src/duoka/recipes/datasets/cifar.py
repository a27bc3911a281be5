"""CIFAR-10 and CIFAR-100 in the official Python format: the downloaded archive, or the folder unpacked from it.

torchvision's reader is not used: it unpickles without restriction, so a file that is read without its checksum
(``verify=False``) could run code. Its addresses and its checksums of the unpacked files are used.
"""

import gzip
import io
import pickle
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch

from duoka.errors import DataError
from duoka.recipes.datasets.download import RemoteFile, data_folder, verify_checksum
from duoka.recipes.datasets.images import Images, ImageSet
from duoka.utils.files import open_file, read_file
from duoka.utils.imports import import_optional
from duoka.utils.text import first_line, shorten

Batch = dict[str, Any]
SHAPE = (3, 32, 32)
ARCHIVES = {
    "cifar10": (170_498_071, "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"),
    "cifar100": (169_001_437, "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7"),
}
"""Bytes and SHA-256 checksum of each archive."""
MAX_BYTES = 300_000_000
"""Most bytes of an unpacked set; the official ones have 186 million."""


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
    """Return the archive of ``"cifar10"`` or ``"cifar100"``, with its address and the checksums of its files."""
    known = getattr(import_optional("torchvision.datasets", extra="vision"), name.upper())
    return CifarArchive(
        known.url,
        *ARCHIVES[name],
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
    if not isinstance(names, list) or not names:
        raise DataError(f"{folder / source.meta[0]} has no list {source.names_key!r}: it is not the official file")
    classes = tuple(_text(name, folder / source.meta[0]) for name in names)
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
        try:
            data = read_file(path, MAX_BYTES)
        except FileNotFoundError as error:
            raise DataError(f"{path} is missing, the folder was not unpacked completely: {remedy}") from error
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}: {remedy}") from error
        if verify:
            verify_checksum(io.BytesIO(data), path, md5, remedy=remedy, kind="MD5")
        batches[name] = _unpickle(data, path)
    return batches


def _read_archive(source: CifarArchive, archive: Path) -> dict[str, Batch]:
    paths = {name: f"{source.folder}/{name}" for name, _ in source.files}
    found: dict[str, bytes] = {}
    try:
        with (
            open_file(archive) as packed,
            gzip.open(packed) as unpacked,
            tarfile.open(fileobj=cast("IO[bytes]", _LimitedReader(unpacked, MAX_BYTES)), mode="r|") as tar,
        ):
            for entry in tar:
                if entry.name in paths.values() and (member := tar.extractfile(entry)) is not None:
                    found[entry.name] = member.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error, ValueError, OverflowError) as error:
        size = f"{archive.stat().st_size:,} bytes" + (f", the official one has {source.size:,}" if source.size else "")
        reason = getattr(error, "strerror", None) or first_line(error)
        raise DataError(f"{archive} ({size}) is truncated or no archive: {reason}: {source.refetch}") from error
    if missing := [path for path in paths.values() if path not in found]:
        raise DataError(f"{archive} holds no {missing[0]}: is it {source.name}? {source.refetch}")
    return {name: _unpickle(found[path], archive / path) for name, path in paths.items()}


class _LimitedReader:
    """The bytes of a stream, and an error beyond a number of them: a small archive may unpack to very many."""

    def __init__(self, stream: Any, most_bytes: int) -> None:
        self._stream, self._left, self._most = stream, most_bytes, most_bytes

    def read(self, count: int) -> bytes:
        """Return the next bytes. Raises OSError beyond the limit."""
        data: bytes = self._stream.read(count)
        self._left -= len(data)
        if self._left < 0:
            raise OSError(f"it unpacks to more than {self._most:,} bytes")
        return data


def _join_batches(source: CifarArchive, batches: dict[Path, Batch], num_classes: int) -> Images:
    """Join batches; each row of a batch's ``data`` is an image, channel by channel."""
    rows, labels = [], []
    for path, batch in batches.items():
        array, numbers = batch.get("data"), batch.get(source.labels_key)
        if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.shape[1:] != (3 * 32 * 32,):
            raise DataError(f"{path} has no 'data' of uint8 rows of 3,072 values: it is not in the official format")
        if not isinstance(numbers, list) or len(numbers) != len(array):
            raise DataError(f"{path} has {len(array)} images, and no list {source.labels_key!r} of the same length")
        if not numbers:
            raise DataError(f"{path} has no images: it is not the official file")
        for label in numbers:
            if type(label) is not int or not 0 <= label < num_classes:
                raise DataError(f"{path} has the label {shorten(repr(label))}, and there are {num_classes} classes")
        rows.append(torch.from_numpy(np.array(array)))  # a copy in usual memory, which may be written
        labels += numbers
    return Images(torch.cat(rows).view(-1, *SHAPE), torch.tensor(labels, dtype=torch.int64))


def _text(name: Any, path: Path) -> str:
    if isinstance(name, bytes):
        name = name.decode(errors="replace")
    if not isinstance(name, str):
        raise DataError(f"{path} has {shorten(repr(name))} where a text should be: it is not the official file")
    return name


def _unpickle(data: bytes, path: Path) -> Batch:
    """Return a batch's dictionary with its keys as text, without running code that the pickle names."""
    try:
        batch = _BatchUnpickler(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:  # a damaged pickle raises errors of any type
        remedy = "it is truncated or not in the official format; get it anew"
        raise DataError(f"cannot read {path} ({len(data):,} bytes): {shorten(first_line(error))}: {remedy}") from error
    if not isinstance(batch, dict):
        raise DataError(f"{path} holds a {type(batch).__name__}, not the dictionary of the official format")
    return {_text(key, path): value for key, value in batch.items()}


def _encode(text: str, encoding: str) -> bytes:
    """Return bytes that Python 3 has pickled as text; other encodings can make much of little, or name a program."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it has text in the encoding {encoding!r}, and batches have latin1")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy._core.multiarray", "_reconstruct"): np.zeros(1).__reduce__()[0],
    ("numpy._core.numeric", "_frombuffer"): np.zeros(1).__reduce_ex__(5)[0],
    ("_codecs", "encode"): _encode,
}
"""The names that pickled arrays need; NumPy before version 2 wrote ``numpy.core``."""


class _BatchUnpickler(pickle._Unpickler):
    """Unpickler of numbers, text and arrays only, because an unrestricted one runs code that the file names.

    It is the one in Python: the one in C takes as much memory as a number in the file says.
    """

    def find_class(self, module: str, name: str) -> Any:
        """Return one of the allowed objects. Raises ``UnpicklingError`` for any other name."""
        found = _ALLOWED.get((module.replace("numpy.core", "numpy._core"), name))
        if found is None:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no image batch needs")
        return found
