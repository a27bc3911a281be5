"""Cache of decoded images: a ``.npy`` file that later runs map into memory, and a JSON header with its fingerprint.

The cache lies beside the image files. The fingerprint covers their names, labels, sizes and modification times. Each
run compares it, decodes a few images again and compares them with the cache; on any difference it rebuilds the cache.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from duoka.errors import StorageError
from duoka.log import logger
from duoka.recipes.datasets.download import locked_folder
from duoka.recipes.datasets.images import Images, ImageSet, Statistics, channel_statistics, read_images
from duoka.utils.files import atomic_write, read_file

MAX_HEADER_BYTES = 100_000
NUM_CHECKED = 16
"""Images that each run decodes again."""


class ImageFile(NamedTuple):
    """A labeled image file."""

    name: str
    """Path below the folder of the set."""
    label: int
    size: int
    """Bytes."""
    modified_ns: int


def load(
    folder: Path, classes: Sequence[str], train: Sequence[ImageFile], test: Sequence[ImageFile], *, size: int
) -> ImageSet:
    """Return images at ``size`` x ``size`` pixels from the cache in ``folder``, which is built if necessary.

    If the cache cannot be written, the images stay in memory, with a warning.

    Raises DataError if an image cannot be read.
    """
    digest = hashlib.blake2b(json.dumps([size, classes, train, test]).encode(), digest_size=16)
    paths = [folder / file.name for file in (*train, *test)]
    shape = (len(paths), 3, size, size)
    cache = _ImageCache(folder / f".duoka-{size}px.npy", paths, shape, len(train), digest.hexdigest())
    with locked_folder(folder):
        pixels, statistics = cache.open() or cache.build()
    first, second = (torch.tensor([file.label for file in part]) for part in (train, test))
    parts = Images(pixels[: len(train)], first), Images(pixels[len(train) :], second)
    return ImageSet(folder.resolve().name, tuple(classes), *parts, statistics=statistics)


@dataclass(frozen=True)
class _ImageCache:
    """The two files of a cache, and the images that they must hold."""

    path: Path
    """The ``.npy`` file; the header has the same name with ``.json``."""
    images: Sequence[Path]
    shape: tuple[int, int, int, int]
    num_train: int
    fingerprint: str

    @property
    def header(self) -> Path:
        return self.path.with_suffix(".json")

    def open(self) -> tuple[Tensor, Statistics] | None:
        """Return the mapped pixels, private to this process; ``None`` if there is no valid cache."""
        if not self.header.is_file():
            return None
        try:
            header = json.loads(read_file(self.header, MAX_HEADER_BYTES))
            statistics = Statistics(tuple(header["mean"]), tuple(header["std"]))
            if header["fingerprint"] != self.fingerprint:
                logger.info("%s: the images have changed since they were decoded: rebuilding", self.path)
                return None
            pixels = self._map()
        except Exception as error:  # numpy and json raise errors of many types for damaged headers
            logger.warning("%s is damaged (%s): rebuilding it", self.path, error)
            return None
        checked = torch.linspace(0, len(pixels) - 1, min(NUM_CHECKED, len(pixels))).long()
        decoded = torch.empty((len(checked), *self.shape[1:]), dtype=torch.uint8)
        read_images([self.images[index] for index in checked.tolist()], decoded)
        different = (pixels[checked] != decoded).flatten(1).any(1).nonzero().flatten()
        if len(different):
            image = self.images[int(checked[different[0]])]
            logger.warning("%s does not hold the image %s: rebuilding it", self.path, image)
            return None
        return pixels, statistics

    def build(self) -> tuple[Tensor, Statistics]:
        """Decode all images into a new cache; a build that fails leaves no file."""
        try:
            with atomic_write(self.path, needed_bytes=math.prod(self.shape)) as file:
                array = _map_new_array(file, self.shape)
                _, statistics = self._decode(torch.from_numpy(array))
                array.flush()
                self.header.unlink(missing_ok=True)  # at no time does a header describe other pixels
        except StorageError as error:
            logger.warning("%s: the images stay in memory, decoded in every run", error)
            return self._decode(torch.empty(self.shape, dtype=torch.uint8))
        with atomic_write(self.header) as file:
            header = {"fingerprint": self.fingerprint, "mean": statistics.mean, "std": statistics.std}
            file.write(json.dumps(header).encode())
        return self._map(), statistics

    def _decode(self, pixels: Tensor) -> tuple[Tensor, Statistics]:
        logger.info("decoding %d images of %s, once", len(self.images), self.path.parent)
        read_images(self.images, pixels, description="decoding images")
        return pixels, channel_statistics(pixels[: self.num_train])

    def _map(self) -> Tensor:
        array = np.load(self.path, mmap_mode="c")
        if (array.shape, array.dtype) != (self.shape, np.uint8):
            raise ValueError(f"it has the shape {array.shape}, not {self.shape}")
        return torch.from_numpy(array)


def _map_new_array(file: BinaryIO, shape: tuple[int, ...]) -> Any:
    """Return a uint8 array in a new ``.npy`` file, mapped for writing."""
    np.lib.format.write_array_header_2_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    start = file.tell()
    file.truncate(start + math.prod(shape))
    file.flush()
    return np.memmap(file, np.uint8, "r+", start, shape)
