"""Image files packed once into one file of bytes, which later starts map into memory instead of decoding anything.

The pack lies beside the files, and is made anew when they are others than those it was made of: their names, sizes and
times are compared at every start, and a few images are decoded again and compared with it. Its layout: eight bytes of
name, the length of the header (8 bytes, little-endian), the header in JSON, zeros up to a whole page, then the pixels of
the training and of the test part, uint8 ``(images, 3, height, width)``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from duoka.errors import DataError
from duoka.log import logger
from duoka.recipes.datasets.download import one_at_a_time
from duoka.recipes.datasets.images import Images, ImageSet, Statistics, read_image, statistics_of

__all__ = ["CachedFiles", "load"]

MAGIC = b"duokapk1"
PAGE = 4096
PROBES = 16
"""How many images are decoded again at each start."""
CHUNK = 512
"""How many images are decoded from one step of the progress bar to the next."""


@dataclass(frozen=True)
class CachedFiles:
    """The image files of one part."""

    names: tuple[str, ...]
    """Paths below the folder."""
    labels: tuple[int, ...]
    stats: tuple[tuple[int, int], ...]
    """Size in bytes and time of the last change in ns, of each."""


@dataclass(frozen=True)
class _CacheKey:
    """What a pack is to hold."""

    folder: Path
    names: tuple[str, ...]
    size: int
    """Pixels a side."""
    train: int
    """How many of the images are for training; they come first."""
    fingerprint: str
    """Changes when any of the files does."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self.names), 3, self.size, self.size

    def image(self, place: int) -> Tensor:
        return read_image(self.folder / self.names[place], self.shape[1:])


def load(folder: Path, classes: Sequence[str], train: CachedFiles, test: CachedFiles, *, size: int) -> ImageSet:
    """Return the images at ``size`` x ``size`` pixels, from the pack in ``folder``, which is made if it has to be.

    Where it cannot be written the images are kept in memory, and the log says so.

    Raises:
        DataError: an image that cannot be read.

    """
    names = (*train.names, *test.names)
    wanted = _CacheKey(folder, names, size, len(train.names), _fingerprint(classes, (train, test), size))
    pack = folder / f".duoka-{size}px.pack"
    with one_at_a_time(folder):
        pixels, statistics = _opened(pack, wanted) or _made(pack, wanted)
    first, second = pixels[: wanted.train], pixels[wanted.train :]
    parts = Images(first, torch.tensor(train.labels)), Images(second, torch.tensor(test.labels))
    return ImageSet(folder.resolve().name, tuple(classes), *parts, statistics=statistics)


def _fingerprint(classes: Sequence[str], parts: Sequence[CachedFiles], size: int) -> str:
    digest = hashlib.blake2b(repr((size, tuple(classes))).encode(), digest_size=16)
    for part in parts:
        digest.update(repr((part.names, part.labels, part.stats)).encode())
    return digest.hexdigest()


def _opened(pack: Path, wanted: _CacheKey) -> tuple[Tensor, Statistics] | None:
    """Return what the pack holds, mapped; ``None`` where there is none or it is not of these files."""
    if not pack.is_file():
        return None
    try:
        header, offset = _header(pack)
        statistics = Statistics(tuple(header["mean"]), tuple(header["std"]))
        if header["fingerprint"] != wanted.fingerprint:
            logger.info("the images in %s have changed since they were packed: they are packed anew", wanted.folder)
            return None
        pixels = torch.from_numpy(np.memmap(pack, np.uint8, "c", offset, wanted.shape))
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s is damaged (%s): it is made anew", pack, error)
        return None
    for place in torch.linspace(0, len(pixels) - 1, min(PROBES, len(pixels))).long().tolist():
        if not torch.equal(pixels[place], wanted.image(place)):
            logger.warning("%s does not hold the image %s: it is made anew", pack, wanted.names[place])
            return None
    return pixels, statistics


def _header(pack: Path) -> tuple[dict[str, Any], int]:
    """Return a pack's header and where its pixels begin."""
    with pack.open("rb") as file:
        if file.read(8) != MAGIC:
            raise ValueError("its first bytes are not those of a pack")
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(min(length, PAGE))), PAGE


def _made(pack: Path, wanted: _CacheKey) -> tuple[Tensor, Statistics]:
    """Decode all images into a new pack; of one that is cut short nothing stays."""
    part = pack.with_name(f"{pack.name}.part")
    try:
        with part.open("wb") as file:
            file.truncate(PAGE + int(np.prod(wanted.shape)))
        array = np.memmap(part, np.uint8, "r+", PAGE, wanted.shape)
    except OSError as error:
        logger.warning("cannot write %s (%s): the images are decoded at every start, and kept in memory", pack, error)
        pixels = torch.empty(wanted.shape, dtype=torch.uint8)
        _decode(wanted, lambda place: pixels[place].copy_(wanted.image(place)))
        return pixels, _statistics(pixels, wanted)
    try:
        _decode(wanted, lambda place: array.__setitem__(place, wanted.image(place).numpy()))
        statistics = _statistics(torch.from_numpy(array), wanted)
        array.flush()
        _write_header(part, {"fingerprint": wanted.fingerprint, "mean": statistics.mean, "std": statistics.std})
        part.replace(pack)
    finally:
        part.unlink(missing_ok=True)
    return torch.from_numpy(np.memmap(pack, np.uint8, "c", PAGE, wanted.shape)), statistics


def _write_header(part: Path, header: dict[str, Any]) -> None:
    text = json.dumps(header).encode()
    with part.open("r+b") as file:
        file.write(MAGIC + len(text).to_bytes(8, "little") + text)
        file.flush()
        os.fsync(file.fileno())


def _statistics(pixels: Tensor, wanted: _CacheKey) -> Statistics:
    return statistics_of(Images(pixels[: wanted.train], torch.zeros(wanted.train)))


def _decode(wanted: _CacheKey, place: Callable[[int], object]) -> None:
    """Call ``place`` for every image in threads, as Pillow decodes outside the interpreter's lock; shows progress."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    total = len(wanted.names)
    logger.info("packing %d images of %s, once", total, wanted.folder)
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        Progress(*columns, console=Console(stderr=True, force_jupyter=False)) as bar,
    ):
        task = bar.add_task("packing images", total=total)
        try:
            for start in range(0, total, CHUNK):
                places = range(start, min(start + CHUNK, total))
                for _ in pool.map(place, places):
                    pass
                bar.advance(task, len(places))
        except DataError:
            pool.shutdown(cancel_futures=True)
            raise
