"""Synthetic ratings in MovieLens-1M's format with a known ground truth: low-rank tastes, partly visible in the texts."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from duoka.errors import ConfigError
from duoka.recipes.datasets.movielens_format import AGES, NAMES, OCCUPATIONS, Integers
from duoka.utils.files import atomic_write

Numbers = NDArray[np.float64]

GENRES = (
    "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
FIRST_WORDS = (
    "Quiet", "Crimson", "Last", "Hidden", "Golden", "Broken", "Silent", "Wild", "Distant", "Burning", "Frozen",
    "Little", "Electric", "Paper", "Lonely", "Midnight",
)  # fmt: skip
SECOND_WORDS = (
    "River", "Harbor", "Garden", "Mirror", "Soldier", "Letter", "Orchard", "Station", "Winter", "Dancer",
    "Empire", "Lantern", "Island", "Kingdom", "Road", "Stranger", "Carousel", "Voyage", "Café", "Señor",
)  # fmt: skip
RANK = 6
"""Dimensions of taste."""
TEXT_VARIANCE = 0.7
"""Share of a taste's variance that the text determines; the rest is individual."""
AFFINITY, POPULARITY, NOISE = 2.0, 1.0, 0.5
"""Weights of affinity and popularity in a user's utility, and the standard deviation of a rating's noise."""
MIN_RATINGS = 20
"""Fewest ratings of a user, as in the official set; less if there are fewer than 40 films."""


@dataclass(frozen=True)
class SyntheticRatings:
    """Users, films and ratings, with the ground truth that they are drawn from."""

    genders: Integers
    ages: Integers
    occupations: Integers
    """For each user, indices into ``F, M``, the age groups and the occupations ``(users,)``."""
    titles: tuple[str, ...]
    genres: tuple[tuple[str, ...], ...]
    """For each film."""
    users: Integers
    items: Integers
    stars: Integers
    """For each rating: indices of user and film, and 1 to 5 ``(ratings,)``, by user, then by time."""
    utility: Numbers
    """Ground truth for each user and film ``(users, films)``: a user rates films of high utility first."""


def make(users: int = 1_000, films: int = 800, ratings: int = 60_000, seed: int = 0) -> SyntheticRatings:
    """Draw a set, which is a function of the arguments.

    A taste is a vector of 6 numbers. Each gender, age group, occupation, genre and first word of a title has one, drawn
    from a normal distribution. The sum of those in a user's text makes 70 % of the variance of the user's taste, and
    30 % is individual. A film's taste is made likewise, with the mean over its one to three genres. Affinity is the
    product of two tastes, scaled to variance 1. The utility of a film for a user is 2 times their affinity plus the
    film's popularity, a standard normal number that is in no text. Each user rates films in the order of utility plus
    standard Gumbel noise. The number of films is log-normal. Stars are the fifths of affinity plus normal noise of
    deviation 0.5.

    Raises ConfigError if the sizes do not fit together.
    """
    fewest = min(MIN_RATINGS, films // 2)
    if users < 1 or films < 4 or seed < 0 or not users * fewest <= ratings <= users * films // 2:
        raise ConfigError(
            f"users={users}, films={films}, ratings={ratings} and seed={seed} do not fit together: use at least 1 user and "
            f"4 films, a seed of 0 or more, and ratings from {fewest} a user to half of all pairs, {users * fewest:,} to "
            f"{users * films // 2:,}"
        )
    random = np.random.default_rng(seed)
    genders, ages = random.integers(0, 2, users), random.integers(0, len(AGES), users)
    occupations = random.integers(0, len(OCCUPATIONS), users)
    text_taste = _normal(random, 2)[genders] + _normal(random, len(AGES))[ages]
    text_taste = text_taste + _normal(random, len(OCCUPATIONS))[occupations]
    user_taste = _add_individual_taste(text_taste, random)
    ranks = random.random((films, len(GENRES))).argsort(1).argsort(1)
    has_genre = (ranks < random.integers(1, 4, (films, 1))).astype(np.float64)  # one to three genres a film
    first_words = random.integers(0, len(FIRST_WORDS), films)
    text_taste = has_genre / has_genre.sum(1, keepdims=True) @ _normal(random, len(GENRES)) * 1.5
    text_taste = text_taste + _normal(random, len(FIRST_WORDS))[first_words]
    affinity = user_taste @ _add_individual_taste(text_taste, random).T / np.sqrt(RANK)
    utility = AFFINITY * affinity + POPULARITY * random.standard_normal(films)
    counts = _draw_counts(users, fewest, max(1, films * 3 // 4), ratings, random)
    raters, items = _draw_ratings(utility, counts, random)
    scores = affinity[raters, items] + NOISE * random.standard_normal(len(items))
    stars = np.searchsorted(np.quantile(scores, (0.2, 0.4, 0.6, 0.8)), scores) + 1
    titles = tuple(
        f"{FIRST_WORDS[word]} {SECOND_WORDS[random.integers(len(SECOND_WORDS))]} ({random.integers(1930, 2001)})"
        for word in first_words.tolist()
    )
    genres = tuple(tuple(name for name, has in zip(GENRES, row, strict=True) if has) for row in has_genre.tolist())
    return SyntheticRatings(genders, ages, occupations, titles, genres, raters, items, stars, utility)


def write(folder: Path, data: SyntheticRatings, seed: int = 0) -> None:
    """Write ``users.dat``, ``movies.dat`` and ``ratings.dat``; film ids have gaps, as the official ones do.

    Raises StorageError if a file cannot be written.
    """
    random = np.random.default_rng((seed, 1))
    film_ids = np.cumsum(random.integers(1, 4, len(data.titles)))
    ages, genders = list(AGES), "FM"
    rows = zip(data.genders.tolist(), data.ages.tolist(), data.occupations.tolist(), strict=True)
    users = [f"{user}::{genders[g]}::{ages[a]}::{o}::{10_000 + user}" for user, (g, a, o) in enumerate(rows, 1)]
    films = [
        f"{film_id}::{title}::{'|'.join(genres)}"
        for film_id, title, genres in zip(film_ids.tolist(), data.titles, data.genres, strict=True)
    ]
    times = 956_700_000 + data.users * 1_000 + 60 * np.arange(len(data.users))
    columns = (data.users + 1, film_ids[data.items], data.stars, times)
    ratings = ["::".join(map(str, row)) for row in zip(*(column.tolist() for column in columns), strict=True)]
    for name, lines in zip(NAMES, (users, films, ratings), strict=True):
        with atomic_write(folder / name) as file:
            file.write(("\n".join(lines) + "\n").encode("latin-1"))


def _normal(random: np.random.Generator, rows: int) -> Numbers:
    return random.standard_normal((rows, RANK))


def _add_individual_taste(text_taste: Numbers, random: np.random.Generator) -> Numbers:
    """Return tastes of variance 1, to which the text and a random part contribute."""
    text_taste = (text_taste - text_taste.mean(0)) / (text_taste.std(0) + 1e-12)
    individual = _normal(random, len(text_taste))
    taste: Numbers = np.sqrt(TEXT_VARIANCE) * text_taste + np.sqrt(1 - TEXT_VARIANCE) * individual
    return taste


def _draw_counts(users: int, fewest: int, most: int, ratings: int, random: np.random.Generator) -> Integers:
    """Return the number of ratings of each user: log-normal within bounds, with the sum ``ratings``."""
    weights = random.lognormal(0, 0.9, users)
    counts = np.full(users, fewest)
    while (left := ratings - int(counts.sum())) > 0:
        below = counts < most
        more = np.floor(left * weights * below / (weights * below).sum()).astype(np.int64)
        if not more.any():
            more[np.flatnonzero(below)[:left]] = 1
        counts = np.minimum(counts + more, most)
    return counts


def _draw_ratings(utility: Numbers, counts: Integers, random: np.random.Generator) -> tuple[Integers, Integers]:
    """Return user and film of each rating: each user's first films by utility with noise, in a random order of time."""
    items = []
    for user, count in enumerate(counts.tolist()):
        order = np.argpartition(-(utility[user] + random.gumbel(size=utility.shape[1])), count - 1)
        items.append(random.permutation(order[:count]))
    return np.repeat(np.arange(len(counts)), counts), np.concatenate(items)
