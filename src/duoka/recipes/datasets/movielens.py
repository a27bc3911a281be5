"""MovieLens-1M for recommenders: users and films by consecutive index, their texts, and ratings in three parts.

`movielens_format` reads the official files, `synthetic_movielens` makes an example, `negative_sampling` draws films that
a user has not rated. Source: F. M. Harper and J. A. Konstan, The MovieLens Datasets: History and Context, ACM TiiS 5(4),
2015, https://grouplens.org/datasets/movielens/1m/.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from duoka.errors import DataError
from duoka.recipes.datasets.download import RemoteFile, data_folder
from duoka.recipes.datasets.movielens_format import (
    NAMES,
    Integers,
    Ratings,
    example_hint,
    read_films,
    read_ratings,
    read_users,
)
from duoka.utils.validation import check_choice, invalid_option

ARCHIVE = RemoteFile(
    "https://files.grouplens.org/datasets/movielens/ml-1m.zip",
    None,
    "a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20",
)
"""The official archive, 6 MB."""
PARTS = ("train", "validation", "test")
SPLITS = ("random", "per-user", "time", "cold-films")
MIN_RATINGS = 3
"""Ratings of a user below which a split by user puts all of them into training."""


class SeenItems(NamedTuple):
    """Films that each user has rated: those of user ``u`` are ``indices[indptr[u]:indptr[u + 1]]``, ascending."""

    indptr: Tensor
    """int64 ``(users + 1,)``."""
    indices: Tensor
    """int64 ``(pairs,)``."""

    @classmethod
    def from_pairs(cls, pairs: Integers, n_users: int, n_items: int) -> SeenItems:
        """Return the structure of distinct ``pairs (pairs, 2)``, on the CPU."""
        keys = np.sort(pairs[:, 0] * n_items + pairs[:, 1])
        counts = np.bincount(pairs[:, 0], minlength=n_users)
        indptr = np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
        return cls(torch.from_numpy(indptr), torch.from_numpy(keys % n_items))

    def to(self, device: torch.device) -> SeenItems:
        """Return the same structure on ``device``."""
        return SeenItems(*(part.to(device) for part in self))

    def items_of(self, user: int) -> Tensor:
        """Return the films that ``user`` has rated."""
        return self.indices[self.indptr[user] : self.indptr[user + 1]]

    def pairs(self, users: Tensor) -> tuple[Tensor, Tensor]:
        """Return all films of ``users``, ``(pairs,)``, after the row in ``users`` of each."""
        starts, counts = self.indptr[users], self.counts(users)
        rows = torch.arange(len(users), device=users.device).repeat_interleave(counts)
        offsets = torch.arange(len(rows), device=users.device) - (counts.cumsum(0) - counts)[rows]
        return rows, self.indices[starts[rows] + offsets]

    def counts(self, users: Tensor) -> Tensor:
        """Return the number of films of each of ``users``, ``(users,)``."""
        return self.indptr[users + 1] - self.indptr[users]

    def matrix(self, users: Tensor, n_items: int) -> Tensor:
        """Return ``(users, n_items)``, 1.0 at each user's films and 0.0 elsewhere."""
        marked = torch.zeros(len(users), n_items, device=users.device)
        marked[self.pairs(users)] = 1
        return marked


class ML1MDataset:
    """MovieLens-1M, or a set in its format; users and films are indexed from 0 by ascending id.

    Args:
        path: the folder with ``users.dat``, ``movies.dat`` and ``ratings.dat``, or the one that ``ml-1m`` is in.
        split_ratio: shares of training, validation and test.
        split: ``random``, ``per-user``, ``time`` (each user's last ratings are the test) or ``cold-films`` (all ratings
            of the test's films are in the test).
        seed: the seed of a random split.
        download: whether the set may be downloaded if it is missing.

    Attributes:
        user_ids, item_ids: ids in the files by index, int64 ``(users,)`` and ``(films,)``.
        n_users, n_items: numbers of users and of films, with those that have no rating.
        user_texts, item_texts: texts by index, a field a line: gender, age group and occupation, or genres and title.
        titles: titles of the films.
        train, validation, test: the ``Ratings`` of each part.

    Raises ConfigError if the split is not possible, and DataError if files are missing or a line does not fit the format;
    the message names file, line and remedy.
    """

    def __init__(
        self,
        path: str | Path,
        split_ratio: Sequence[float] = (0.8, 0.1, 0.1),
        split: str = "random",
        seed: int = 0,
        *,
        download: bool = False,
    ) -> None:
        self.folder = locate(path, download=download)
        users, films, ratings = (self.folder / name for name in NAMES)
        self.users, self.films = read_users(users), read_films(films)
        self.user_ids = np.array([user.id for user in self.users], dtype=np.int64)
        self.item_ids = np.array([film.id for film in self.films], dtype=np.int64)
        self.n_users, self.n_items = len(self.users), len(self.films)
        self.user_texts = [user.text for user in self.users]
        self.item_texts = [film.text for film in self.films]
        self.titles = [film.title for film in self.films]
        found = read_ratings(ratings, self.user_ids, self.item_ids)
        self.train, self.validation, self.test = map(found.select, split_ratings(found, split_ratio, split, seed))

    def part(self, name: str) -> Ratings:
        """Return the ratings of ``train``, ``validation`` or ``test``."""
        check_choice("part", name, PARTS)
        part: Ratings = getattr(self, name)
        return part

    def seen(self, *parts: str) -> SeenItems:
        """Return the films that each user has rated in these parts, by default in training."""
        pairs = [self.part(name).pairs for name in parts or ("train",)]
        return SeenItems.from_pairs(np.concatenate(pairs), self.n_users, self.n_items)

    def metadata(self) -> dict[str, Any]:
        """Return counts and two checksums that distinguish this set from others.

        ``entities`` covers users and films, ``parts`` the ratings of each part.
        """
        counts = {"users": self.n_users, "films": self.n_items, **{name: len(self.part(name)) for name in PARTS}}
        numbers = self.user_ids.tobytes() + self.item_ids.tobytes()
        entities = zlib.crc32("\n".join([*self.user_texts, *self.item_texts]).encode(), zlib.crc32(numbers))
        parts = 0
        for name in PARTS:
            parts = zlib.crc32(self.part(name).pairs.tobytes(), zlib.crc32(name.encode(), parts))
        return {**counts, "entities": f"{entities:08x}", "parts": f"{parts:08x}"}

    def user_index(self, user_id: int) -> int:
        """Return the index of the user with this id in the file. Raises DataError if there is no such user."""
        index = int(np.searchsorted(self.user_ids, user_id))
        if index == self.n_users or self.user_ids[index] != user_id:
            ids = f"{self.user_ids[0]} to {self.user_ids[-1]}"
            raise DataError(
                f"there is no user {user_id} in {self.folder / NAMES[0]}: its {self.n_users:,} users are {ids}"
            )
        return index


def locate(root: str | Path, *, download: bool = False) -> Path:
    """Return the folder of the three files: ``root``, or ``ml-1m`` in it, unpacked or downloaded if it is missing.

    Raises DataError if some of the files are missing or the archive is damaged, and StorageError if the folder cannot be
    written.
    """
    root = data_folder(root)
    existed = (root / "ml-1m").exists()  # read before its files, because another process may unpack them now
    found = _find(root)
    if found is None and not existed:
        missing = f"{root} holds neither {', '.join(NAMES)}, nor ml-1m, nor {ARCHIVE.file_name}"
        archive = dataclasses.replace(ARCHIVE, alternative=f", {example_hint()}")
        archive.unpack(root, download=download, missing=missing)
        found = _find(root)
    if found is None:
        raise DataError(
            f"{root / 'ml-1m'} holds none of {', '.join(NAMES)}: delete it to unpack it anew, or unpack {ARCHIVE.url}"
        )
    return found


def _find(root: Path) -> Path | None:
    for folder in (root, root / "ml-1m"):
        missing = [name for name in NAMES if not (folder / name).is_file()]
        if not missing:
            return folder
        if len(missing) < len(NAMES):
            remedy = f"unpack {ARCHIVE.url} again, {example_hint()}"
            raise DataError(f"{folder} lacks {' and '.join(missing)}: {remedy}")
    return None


def check_ratio(ratio: Sequence[float]) -> tuple[float, float, float]:
    """Return the shares of training, validation and test.

    Raises ConfigError if they are not three shares above 0 that sum to 1.
    """
    shares = tuple(float(share) for share in ratio)
    if len(shares) != len(PARTS) or not all(share > 0 for share in shares) or not math.isclose(sum(shares), 1):
        expected = "the shares of training, validation and test, each above 0, with the sum 1"
        raise invalid_option("split_ratio", [*shares], expected, "such as [0.8, 0.1, 0.1]")
    return shares  # type: ignore[return-value]


def split_ratings(ratings: Ratings, ratio: Sequence[float], split: str, seed: int) -> tuple[Integers, ...]:
    """Return the rows of training, validation and test.

    - ``random``: all ratings at random.
    - ``per-user``: each user's ratings at random; a user with three or more has some in each part.
    - ``time``: each user's ratings by time; the last are the test, those before them the validation. Ratings of the
      same second keep the order of the file.
    - ``cold-films``: films at random with all their ratings, so that training has no rating of the test's films.

    Raises ConfigError if ``ratio`` or ``split`` is not valid, and DataError if a part has no rating.
    """
    shares = check_ratio(ratio)
    check_choice("split", split, SPLITS)
    random = np.random.default_rng(seed)
    if split in ("random", "cold-films"):
        part = _split_randomly(ratings, shares, random, by_film=split == "cold-films")
    else:
        part = _split_by_user(ratings, shares, None if split == "time" else random)
    rows = tuple(np.flatnonzero(part == number) for number in range(len(PARTS)))
    for name, found in zip(PARTS, rows, strict=True):
        if not len(found):
            raise DataError(
                f"the {name} part is empty: the split {split!r} of {len(ratings):,} ratings by "
                f"{', '.join(f'{share:g}' for share in shares)} gives it none: give more ratings, or another split_ratio"
            )
    return rows


def _split_randomly(
    ratings: Ratings, shares: tuple[float, float, float], random: np.random.Generator, *, by_film: bool
) -> NDArray[np.int8]:
    """Return the part of each rating, drawn for each rating or for each film that has ratings."""
    units = np.unique(ratings.items) if by_film else np.arange(len(ratings))
    validation, test = (round(len(units) * share) for share in (shares[0], shares[0] + shares[1]))
    part = np.zeros(int(units.max(initial=0)) + 1, dtype=np.int8)
    shuffled = random.permutation(units)
    part[shuffled[validation:test]], part[shuffled[test:]] = 1, 2
    return part[ratings.items] if by_film else part


def _split_by_user(
    ratings: Ratings, shares: tuple[float, float, float], random: np.random.Generator | None
) -> NDArray[np.int8]:
    """Return the part of each rating, drawn within each user's ratings; without ``random``, by their times."""
    keys = ratings.times if random is None else random.permutation(len(ratings))
    order = np.lexsort((keys, ratings.users))  # stable: the file's order decides between equal times
    counts = np.bincount(ratings.users)
    counts = counts[counts > 0]
    starts = np.cumsum(counts) - counts
    rank = np.arange(len(order)) - np.repeat(starts, counts)  # of a rating among its user's
    test = np.where(counts < MIN_RATINGS, 0, np.maximum(1, np.rint(counts * shares[2]))).astype(np.int64)
    validation = np.where(counts < MIN_RATINGS, 0, np.maximum(1, np.rint(counts * shares[1]))).astype(np.int64)
    test = np.minimum(test, np.maximum(0, counts - 2))  # large shares of few ratings leave some for the other parts
    validation = np.minimum(validation, np.maximum(0, counts - test - 1))
    part = np.zeros(len(order), dtype=np.int8)
    in_validation = rank >= np.repeat(counts - test - validation, counts)
    in_test = rank >= np.repeat(counts - test, counts)
    part[order] = in_validation.astype(np.int8) + in_test
    return part
