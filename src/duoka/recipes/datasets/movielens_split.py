"""Which ratings are for training, for validation and for the test."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from duoka.errors import ConfigError, DataError
from duoka.recipes.datasets.movielens_format import Ratings

__all__ = ["PARTS", "SPLITS", "check_ratio", "split_of"]

Integers = NDArray[np.int64]
PARTS = ("train", "validation", "test")
SPLITS = ("random", "per-user", "time", "cold-films")
FEWEST = 3
"""Ratings that a user must have to be divided user by user; with fewer all are for training."""


def check_ratio(ratio: Sequence[float]) -> tuple[float, float, float]:
    """Return the shares of training, validation and test.

    Raises:
        ConfigError: they are not three shares above 0 that sum to 1.

    """
    shares = tuple(float(share) for share in ratio)
    if len(shares) != len(PARTS) or not all(share > 0 for share in shares) or not math.isclose(sum(shares), 1):
        given = ", ".join(f"{share:g}" for share in shares)
        raise ConfigError(
            f"split_ratio is [{given}]: give the shares of training, validation and test, each above 0, such as [0.8, 0.1, 0.1]"
        )
    return shares  # type: ignore[return-value]


def split_of(ratings: Ratings, ratio: Sequence[float], how: str, seed: int) -> tuple[Integers, Integers, Integers]:
    """Return the rows of training, validation and test.

    - ``random``: all ratings together, at random.
    - ``per-user``: each user's ratings at random, so that everybody with three or more has some in each part.
    - ``time``: each user's ratings in their order; the last are the test, those before them the validation. Ratings of the
      same second stay in the order of the file.
    - ``cold-films``: films at random with all their ratings, so that the test is about films that training has never seen.

    Raises:
        ConfigError: ``ratio`` or ``how`` cannot be.
        DataError: a part has no rating.

    """
    shares = check_ratio(ratio)
    if how not in SPLITS:
        raise ConfigError(f"split is {how!r}: there is {', '.join(SPLITS)}")
    random = np.random.default_rng(seed)
    if how in ("random", "cold-films"):
        parts = _at_random(ratings, shares, random, films=how == "cold-films")
    else:
        parts = _by_user(ratings, shares, None if how == "time" else random)
    for name, rows in zip(PARTS, parts, strict=True):
        if not len(rows):
            raise DataError(
                f"the {name} part is empty: the split {how!r} of {len(ratings.users):,} ratings by "
                f"{', '.join(f'{share:g}' for share in shares)} gives it none: give more ratings, or another split_ratio"
            )
    return parts


def _at_random(
    ratings: Ratings, shares: tuple[float, float, float], random: np.random.Generator, *, films: bool
) -> tuple[Integers, Integers, Integers]:
    """Divide all ratings, or all films that have ratings, at random; rows stay in the order of the file."""
    units = np.unique(ratings.items) if films else np.arange(len(ratings.users))
    first, second = (round(len(units) * share) for share in (shares[0], shares[0] + shares[1]))
    part = np.zeros(int(units.max(initial=0)) + 1, dtype=np.int8)
    mixed = random.permutation(units)
    part[mixed[first:second]], part[mixed[second:]] = 1, 2
    return _rows(part[ratings.items] if films else part)


def _by_user(
    ratings: Ratings, shares: tuple[float, float, float], random: np.random.Generator | None
) -> tuple[Integers, Integers, Integers]:
    """Divide each user's ratings: at random, or without ``random`` in the order of their times."""
    keys = ratings.times if random is None else random.permutation(len(ratings.users))
    order = np.lexsort((keys, ratings.users))  # stable: the file's order decides between equal times
    counts = np.bincount(ratings.users)
    counts = counts[counts > 0]
    begins = np.cumsum(counts) - counts
    place = np.arange(len(order)) - np.repeat(begins, counts)
    test = np.where(counts < FEWEST, 0, np.maximum(1, np.rint(counts * shares[2]))).astype(np.int64)
    validation = np.where(counts < FEWEST, 0, np.maximum(1, np.rint(counts * shares[1]))).astype(np.int64)
    test = np.minimum(test, np.maximum(0, counts - 2))  # large shares of few ratings leave some for the other parts
    validation = np.minimum(validation, np.maximum(0, counts - test - 1))
    part = np.zeros(len(order), dtype=np.int8)
    part[order] = (place >= np.repeat(counts - test - validation, counts)).astype(np.int8) + (
        place >= np.repeat(counts - test, counts)
    )
    return _rows(part)


def _rows(part: NDArray[np.int8]) -> tuple[Integers, Integers, Integers]:
    train, validation, test = (np.flatnonzero(part == number) for number in range(len(PARTS)))
    return train, validation, test
