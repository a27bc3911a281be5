"""MovieLens-1M as recommenders want it: users and films by dense places, their texts, and ratings in three parts.

`movielens_files` reads the official files, `movielens_split` divides the ratings, `movielens_planted` makes an example,
`negatives` draws what a user does not know. Source: F. M. Harper and J. A. Konstan, The MovieLens Datasets: History and
Context, ACM TiiS 5(4), 2015, https://grouplens.org/datasets/movielens/1m/.
"""

from __future__ import annotations

import shutil
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from duoka.errors import ConfigError, DataError, StorageError
from duoka.recipes.datasets.download import check, fetch, one_at_a_time, refuse_file
from duoka.recipes.datasets.movielens_format import NAMES, read_films, read_ratings, read_users
from duoka.recipes.datasets.movielens_split import PARTS, split_of

__all__ = ["ARCHIVE", "ML1MDataset", "InteractionSplit", "SeenItems", "locate"]

Integers = NDArray[np.int64]
URL = "https://files.grouplens.org/datasets/movielens/ml-1m.zip"
MD5 = "c4d9eecfca2ab87c1945afe126590906"
ARCHIVE = (URL, MD5)
"""Where the set comes from (6 MB), and its checksum."""


@dataclass(frozen=True)
class InteractionSplit:
    """Ratings of one part, in the order of the file."""

    pairs: Integers
    """Places of user and film ``(ratings, 2)``."""
    stars: Integers
    """1 to 5 ``(ratings,)``."""
    times: Integers
    """Seconds since 1970 ``(ratings,)``."""

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def users(self) -> Integers:
        """Places of the users ``(ratings,)``."""
        return self.pairs[:, 0]

    @property
    def items(self) -> Integers:
        """Places of the films ``(ratings,)``."""
        return self.pairs[:, 1]


@dataclass(frozen=True)
class SeenItems:
    """Which films each user knows: those of user ``u`` are ``indices[indptr[u]:indptr[u + 1]]``, ascending."""

    indptr: Integers
    """``(users + 1,)``."""
    indices: Integers
    """``(pairs,)``."""

    @classmethod
    def of(cls, pairs: Integers, n_users: int, n_items: int) -> SeenItems:
        """Return the structure of ``pairs`` ``(pairs, 2)``, of which no two are the same."""
        keys = np.sort(pairs[:, 0] * n_items + pairs[:, 1])
        counts = np.bincount(pairs[:, 0], minlength=n_users)
        return cls(np.concatenate(([0], np.cumsum(counts))).astype(np.int64), keys % n_items)

    def of_user(self, user: int) -> Integers:
        """Return the films that ``user`` knows."""
        return self.indices[self.indptr[user] : self.indptr[user + 1]]


class ML1MDataset:
    """MovieLens-1M, or a set in its format; users and films are numbered from 0 in the order of the files' numbers.

    Args:
        path: the folder with ``users.dat``, ``movies.dat`` and ``ratings.dat``, or the one that ``ml-1m`` is in.
        split_ratio: shares of training, validation and test.
        split: how they are drawn: ``random``, ``per-user``, ``time`` (each user's last ratings are the test) or
            ``cold-films`` (all ratings of the test's films are in the test).
        seed: decides what is random in it.
        download: whether the set may be downloaded where it is not there.

    Attributes:
        user_ids, item_ids: the files' numbers by place, int64 ``(users,)`` and ``(films,)``.
        user_texts, item_texts: what is known of each, by place: gender, age group and occupation, or genres and title, a
            line each. titles: of the films.
        train, validation, test: a ``Part`` each.

    Raises:
        ConfigError: a split that cannot be.
        DataError: files are missing, or a line of one does not fit the format: file, line and remedy.

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
        self.user_texts = [user.text for user in self.users]
        self.item_texts = [film.text for film in self.films]
        self.titles = [film.title for film in self.films]
        found = read_ratings(ratings, self.user_ids, self.item_ids)
        pairs = np.stack((found.users, found.items), axis=1)
        self.train, self.validation, self.test = (
            InteractionSplit(pairs[rows], found.stars[rows], found.times[rows])
            for rows in split_of(found, split_ratio, split, seed)
        )

    @property
    def n_users(self) -> int:
        """How many users there are."""
        return len(self.user_ids)

    @property
    def n_items(self) -> int:
        """How many films there are, those that nobody has rated included."""
        return len(self.item_ids)

    def part(self, name: str) -> InteractionSplit:
        """Return the part ``train``, ``validation`` or ``test``."""
        if name not in PARTS:
            raise ConfigError(f"there is no part {name!r} of the ratings: there is {', '.join(PARTS)}")
        part: InteractionSplit = getattr(self, name)
        return part

    def seen(self, *parts: str) -> SeenItems:
        """Return which films each user knows from these parts; without any, from training."""
        pairs = [self.part(name).pairs for name in parts or ("train",)]
        return SeenItems.of(np.concatenate(pairs), self.n_users, self.n_items)

    def facts(self) -> dict[str, Any]:
        """Return what tells this set from others, to be remembered: counts, and two checksums.

        ``entities`` is that of who and what there is, ``parts`` that of which rating is in which part.
        """
        counts = {"users": self.n_users, "films": self.n_items, **{name: len(self.part(name)) for name in PARTS}}
        numbers = self.user_ids.tobytes() + self.item_ids.tobytes()
        entities = zlib.crc32("\n".join([*self.user_texts, *self.item_texts]).encode(), zlib.crc32(numbers))
        parts = 0
        for name in PARTS:
            parts = zlib.crc32(self.part(name).pairs.tobytes(), zlib.crc32(name.encode(), parts))
        return {**counts, "entities": f"{entities:08x}", "parts": f"{parts:08x}"}

    def user(self, number: int) -> int:
        """Return the place of the user with the file's ``number``.

        Raises:
            DataError: there is none.

        """
        place = int(np.searchsorted(self.user_ids, number))
        if place == self.n_users or self.user_ids[place] != number:
            ends = f"{self.user_ids[0]} to {self.user_ids[-1]}"
            raise DataError(
                f"there is no user {number} in {self.folder / NAMES[0]}: its {self.n_users:,} users are {ends}"
            )
        return place


def locate(root: str | Path, *, download: bool = False) -> Path:
    """Return the folder of the three files: ``root``, or ``ml-1m`` in it, unpacked or downloaded where it is not there.

    Raises:
        DataError: some of the files are missing, or the archive is damaged.
        StorageError: the folder cannot be written.

    """
    root = Path(root)
    refuse_file(root)
    begun = (root / "ml-1m").exists()  # asked before its files are: others may be unpacking it
    for folder in (root, root / "ml-1m"):
        missing = [name for name in NAMES if not (folder / name).is_file()]
        if not missing:
            return folder
        if len(missing) < len(NAMES):
            remedy = f"unpack {URL} again, or make an example: duoka data make movielens"
            raise DataError(f"{folder} lacks {' and '.join(missing)}: {remedy}")
    if begun:
        raise DataError(
            f"{root / 'ml-1m'} holds none of {', '.join(NAMES)}: delete it to have it made anew, or unpack {URL}"
        )
    url, md5 = ARCHIVE
    archive = root / url.rpartition("/")[2]
    if not archive.is_file() and not download:
        remedy = f"allow the download with --download true, fetch {url}, or make an example: duoka data make movielens"
        raise DataError(f"{root} holds neither {', '.join(NAMES)}, nor ml-1m, nor {archive.name}: {remedy}")
    if not archive.is_file():
        fetch(url, archive, size=None, md5=md5)
    with one_at_a_time(root):
        if not (root / "ml-1m").is_dir():
            _unpack(archive, root / "ml-1m", md5)
    return locate(root)


def _unpack(archive: Path, folder: Path, md5: str) -> None:
    """Unpack the set; under its name the folder is never half of it."""
    again = f"delete it and start again to download it anew, or fetch {URL}"
    check(archive, size=None, md5=md5, remedy=again)
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(part, [name for name in opened.namelist() if name.startswith(f"{folder.name}/")])
        (part / folder.name).rename(folder)
    except (zipfile.BadZipFile, zlib.error, EOFError, FileNotFoundError) as error:
        raise DataError(f"{archive} cannot be unpacked: {error}: {again}") from error
    except OSError as error:
        raise StorageError(f"cannot write {part}: {error}: free some space, or choose another --root") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
