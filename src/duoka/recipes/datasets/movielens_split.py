"""Split of ratings into training, validation and test."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from duoka.errors import DataError
from duoka.recipes.datasets.movielens_format import Ratings
from duoka.utils.validation import check_choice, invalid_option

Integers = NDArray[np.int64]
PARTS = ("train", "validation", "test")
SPLITS = ("random", "per-user", "time", "cold-films")
MIN_RATINGS = 3
"""Ratings of a user below which a split by user puts all of them into training."""


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

    Raises:
        ConfigError: ``ratio`` or ``split`` is not valid.
        DataError: a part has no rating.

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
