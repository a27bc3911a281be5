"""An example in MovieLens-1M's format whose law is known: tastes of low rank that the texts tell half of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from duoka.errors import ConfigError, StorageError
from duoka.recipes.datasets.movielens_format import AGES, NAMES, OCCUPATIONS

__all__ = ["SyntheticRatings", "make", "write"]

Numbers = NDArray[np.float64]
Integers = NDArray[np.int64]

GENRES = (
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
)
KINDS = (
    "Quiet", "Crimson", "Last", "Hidden", "Golden", "Broken", "Silent", "Wild", "Distant", "Burning", "Frozen",
    "Little", "Electric", "Paper", "Lonely", "Midnight",
)  # fmt: skip
THINGS = (
    "River", "Harbor", "Garden", "Mirror", "Soldier", "Letter", "Orchard", "Station", "Winter", "Dancer",
    "Empire", "Lantern", "Island", "Kingdom", "Road", "Stranger", "Carousel", "Voyage", "Café", "Señor",
)  # fmt: skip
RANK = 6
"""Dimensions of taste."""
TOLD = 0.7
"""Share of a taste's variance that is in the text, of users and of films; the rest is each one's own."""
STRENGTH, FAME, ERROR = 2.0, 1.0, 0.5
"""Weights of taste and fame in what is watched, and the deviation of a rating's error, in deviations of taste."""
FEWEST = 20
"""Ratings of the user with the fewest, as in the official set (as far as there are films)."""


@dataclass(frozen=True)
class SyntheticRatings:
    """Users, films, and who has rated what."""

    genders: Integers
    ages: Integers
    occupations: Integers
    """Of each user, places in ``F, M``, in the age groups and in the occupations ``(users,)``."""
    titles: tuple[str, ...]
    genres: tuple[tuple[str, ...], ...]
    """Of each film."""
    users: Integers
    items: Integers
    stars: Integers
    """Of each rating: places of user and film, and 1 to 5 ``(ratings,)``, by user and then in the order of time."""
    wishes: Numbers
    """What the law says of each user and film ``(users, films)``: the higher, the sooner it is watched."""


def make(users: int = 1_000, films: int = 800, ratings: int = 60_000, seed: int = 0) -> SyntheticRatings:
    """Draw a set; the same numbers give the same set everywhere.

    The law. A taste is a vector of 6 numbers. Each gender, age group and occupation has one, drawn from a normal
    distribution, and so has each genre and each first word of a title. A user's taste is 70 % (of the variance) the sum of
    those that the text names and 30 % the user's own; a film's likewise, with the mean over its one to three genres. The
    wish of a user for a film is 2 times the product of their tastes (of deviation 1) plus the film's fame, a standard normal
    number that is in no text. Each user watches films in the order of wish plus standard Gumbel noise, as many as a
    log-normal number says; stars are fifths of the product of tastes with normal noise of deviation 0.5.

    Raises:
        ConfigError: sizes that do not go together.

    """
    _check(users, films, ratings, seed)
    random = np.random.default_rng(seed)
    genders, ages = random.integers(0, 2, users), random.integers(0, len(AGES), users)
    occupations = random.integers(0, len(OCCUPATIONS), users)
    told = (
        _normal(random, 2)[genders] + _normal(random, len(AGES))[ages] + _normal(random, len(OCCUPATIONS))[occupations]
    )
    user_taste = _blend(told, random)
    genres, kinds = _genres(films, random), random.integers(0, len(KINDS), films)
    told = (
        genres / genres.sum(1, keepdims=True) @ _normal(random, len(GENRES)) * 1.5 + _normal(random, len(KINDS))[kinds]
    )
    item_taste = _blend(told, random)
    liking = user_taste @ item_taste.T / np.sqrt(RANK)
    wishes = STRENGTH * liking + FAME * random.standard_normal(films)
    owners, items = _watched(wishes, _counts(users, films, ratings, random), random)
    stars = _stars(liking[owners, items] + ERROR * random.standard_normal(len(items)))
    titles = tuple(
        f"{KINDS[kind]} {THINGS[random.integers(len(THINGS))]} ({random.integers(1930, 2001)})"
        for kind in kinds.tolist()
    )
    named = tuple(tuple(name for name, has in zip(GENRES, row, strict=True) if has) for row in genres.tolist())
    return SyntheticRatings(genders, ages, occupations, titles, named, owners, items, stars, wishes)


def write(folder: Path, planted: SyntheticRatings, seed: int = 0) -> None:
    """Write ``users.dat``, ``movies.dat`` and ``ratings.dat``; films' numbers have gaps, as the official ones do.

    Raises:
        StorageError: a file cannot be written.

    """
    from duoka.checkpoint import atomic_write

    random = np.random.default_rng((seed, 1))
    numbers = np.cumsum(random.integers(1, 4, len(planted.titles)))
    ages, genders = list(AGES), "FM"
    rows = zip(planted.genders.tolist(), planted.ages.tolist(), planted.occupations.tolist(), strict=True)
    users = [f"{user}::{genders[g]}::{ages[a]}::{o}::{10_000 + user}" for user, (g, a, o) in enumerate(rows, 1)]
    films = [
        f"{number}::{title}::{'|'.join(genres)}"
        for number, title, genres in zip(numbers.tolist(), planted.titles, planted.genres, strict=True)
    ]
    times = 956_700_000 + planted.users * 1_000 + 60 * np.arange(len(planted.users))
    columns = (planted.users + 1, numbers[planted.items], planted.stars, times)
    ratings = ["::".join(map(str, row)) for row in zip(*(column.tolist() for column in columns), strict=True)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make the folder {folder}: {error}: choose another place") from error
    for name, lines in zip(NAMES, (users, films, ratings), strict=True):
        with atomic_write(folder / name) as file:
            file.write(("\n".join(lines) + "\n").encode("latin-1"))


def _check(users: int, films: int, ratings: int, seed: int) -> None:
    fewest = min(FEWEST, films // 2)
    if users < 1 or films < 4 or seed < 0 or not users * fewest <= ratings <= users * films // 2:
        raise ConfigError(
            f"{users} users, {films} films, {ratings} ratings and the seed {seed} do not go together: there must be 4 films or "
            f"more, a seed of 0 or more, and ratings from {fewest} a user to half of all pairs, {users * fewest:,} to "
            f"{users * films // 2:,}"
        )


def _normal(random: np.random.Generator, rows: int) -> Numbers:
    return random.standard_normal((rows, RANK))


def _blend(told: Numbers, random: np.random.Generator) -> Numbers:
    """Return tastes of variance 1: what the text tells, and each one's own."""
    told = (told - told.mean(0)) / (told.std(0) + 1e-12)
    blended: Numbers = np.sqrt(TOLD) * told + np.sqrt(1 - TOLD) * _normal(random, len(told))
    return blended


def _genres(films: int, random: np.random.Generator) -> Numbers:
    """Return which one to three genres each film has, 0 and 1, ``(films, genres)``."""
    places = random.random((films, len(GENRES))).argsort(1).argsort(1)
    return (places < random.integers(1, 4, (films, 1))).astype(np.float64)


def _counts(users: int, films: int, ratings: int, random: np.random.Generator) -> Integers:
    """Return how many films each user rates: log-normal, within bounds, ``ratings`` in all."""
    fewest, most = min(FEWEST, films // 2), max(1, films * 3 // 4)
    weights = random.lognormal(0, 0.9, users)
    counts = np.full(users, fewest)
    while (left := ratings - int(counts.sum())) > 0:
        open_ = counts < most
        more = np.floor(left * weights * open_ / (weights * open_).sum()).astype(np.int64)
        if not more.any():
            more[np.flatnonzero(open_)[:left]] = 1
        counts = np.minimum(counts + more, most)
    return counts


def _watched(wishes: Numbers, counts: Integers, random: np.random.Generator) -> tuple[Integers, Integers]:
    """Return user and film of each rating: each user's first films by wish with noise, in a random order of time."""
    items = []
    for user, count in enumerate(counts.tolist()):
        order = np.argpartition(-(wishes[user] + random.gumbel(size=wishes.shape[1])), count - 1)
        items.append(random.permutation(order[:count]))
    return np.repeat(np.arange(len(counts)), counts), np.concatenate(items)


def _stars(liking: Numbers) -> Integers:
    """Return 1 to 5 by the fifths of all ratings."""
    return np.searchsorted(np.quantile(liking, (0.2, 0.4, 0.6, 0.8)), liking) + 1
