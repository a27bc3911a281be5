"""MovieLens-1M's three files, read and checked: users and films with their texts, and every rating.

The format is the official one (`users.dat`, `movies.dat`, `ratings.dat`, fields separated by ``::``). What does not fit it is
refused with the file and the line; nothing is guessed. Source: F. M. Harper and J. A. Konstan, The MovieLens Datasets, ACM
TiiS 5(4), 2015, and the README of the archive.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from duoka.errors import DataError
from duoka.utils.imports import import_optional

__all__ = [
    "AGES",
    "NAMES",
    "OCCUPATIONS",
    "SEPARATOR",
    "Film",
    "Ratings",
    "User",
    "read_films",
    "read_ratings",
    "read_users",
]

Integers = NDArray[np.int64]

NAMES = ("users.dat", "movies.dat", "ratings.dat")
SEPARATOR = "::"
GENDERS = {"F": "female", "M": "male"}
AGES = {
    1: "under 18",
    18: "18 to 24",
    25: "25 to 34",
    35: "35 to 44",
    45: "45 to 49",
    50: "50 to 55",
    56: "56 or older",
}
"""Age groups by their code."""
OCCUPATIONS = (
    "other or not specified",
    "academic or educator",
    "artist",
    "clerical or administrative",
    "college or graduate student",
    "customer service",
    "doctor or health care",
    "executive or managerial",
    "farmer",
    "homemaker",
    "K-12 student",
    "lawyer",
    "programmer",
    "retired",
    "sales or marketing",
    "scientist",
    "self-employed",
    "technician or engineer",
    "tradesman or craftsman",
    "unemployed",
    "writer",
)
"""Occupations by their code, from 0."""
USER_FIELDS = "UserID::Gender::Age::Occupation::Zip-code"
FILM_FIELDS = "MovieID::Title::Genres"
RATING_FIELDS = "UserID::MovieID::Rating::Timestamp"
LOWEST, HIGHEST = 1, 5
"""Ratings, in whole stars."""


@dataclass(frozen=True)
class User:
    """A line of ``users.dat``."""

    id: int
    gender: str
    age: str
    occupation: str

    @property
    def text(self) -> str:
        """What is known of the user, a line each; the zip code is left out."""
        return f"{self.gender}\naged {self.age}\n{self.occupation}"


@dataclass(frozen=True)
class Film:
    """A line of ``movies.dat``."""

    id: int
    title: str
    genres: tuple[str, ...]

    @property
    def text(self) -> str:
        """Genres and title, a line each."""
        return f"{', '.join(self.genres)}\n{self.title}"


@dataclass(frozen=True)
class Ratings:
    """``ratings.dat``, in the order of the file, with places instead of numbers of users and films."""

    users: Integers
    """Places among the users ``(ratings,)``."""
    items: Integers
    """Places among the films ``(ratings,)``."""
    stars: Integers
    """1 to 5 ``(ratings,)``."""
    times: Integers
    """Seconds since 1970 ``(ratings,)``."""


def read_users(path: Path) -> tuple[User, ...]:
    """Return the users by their numbers.

    Raises:
        DataError: a line does not fit the format; which, and the remedy.

    """
    found: dict[int, tuple[int, User]] = {}
    for line, fields in _lines(path, 5, USER_FIELDS):
        where = f"{path}, line {line}"
        number = _number(fields[0], "UserID", where)
        gender = _one_of(fields[1], GENDERS, "gender", where)
        age = _one_of(_number(fields[2], "age", where), AGES, "age group", where)
        occupation = _one_of(_number(fields[3], "occupation", where), dict(enumerate(OCCUPATIONS)), "occupation", where)
        _refuse_again(number, found, "user", where)
        found[number] = line, User(number, gender, age, occupation)
    return tuple(found[number][1] for number in sorted(found))


def read_films(path: Path) -> tuple[Film, ...]:
    """Return the films by their numbers.

    Raises:
        DataError: a line does not fit the format, or a film has no title or genres; which, and the remedy.

    """
    found: dict[int, tuple[int, Film]] = {}
    for line, fields in _lines(path, 3, FILM_FIELDS):
        where = f"{path}, line {line}"
        number = _number(fields[0], "MovieID", where)
        title, genres = fields[1].strip(), tuple(genre.strip() for genre in fields[2].split("|"))
        if not title or not all(genres):
            lacks = "title" if not title else "genres" if genres == ("",) else "name for one of its genres"
            raise DataError(f"{where}: film {number} has no {lacks}: write MovieID::Title (year)::Genre|Genre")
        _refuse_again(number, found, "film", where)
        found[number] = line, Film(number, title, genres)
    return tuple(found[number][1] for number in sorted(found))


def read_ratings(path: Path, users: Integers, films: Integers) -> Ratings:
    """Return the ratings; ``users`` and ``films`` are the known numbers, ascending.

    Raises:
        DataError: a line does not fit the format, or names an unknown user or film; which, and the remedy.

    """
    numbers = _parsed(path)
    places = []
    for column, known, what, file in ((0, users, "user", NAMES[0]), (1, films, "film", NAMES[1])):
        place = np.searchsorted(known, numbers[:, column]).clip(max=len(known) - 1)
        for row in np.flatnonzero(known[place] != numbers[:, column])[:1].tolist():
            remedy = f"remove the line, or add the {what} there"
            raise DataError(f"{path}, line {row + 1}: {what} {numbers[row, column]} is not in {file}: {remedy}")
        places.append(place.astype(np.int64))
    for row in np.flatnonzero((numbers[:, 2] < LOWEST) | (numbers[:, 2] > HIGHEST))[:1].tolist():
        _complain(path, row + 1, f"the rating is {numbers[row, 2]}: it must be {LOWEST} to {HIGHEST}")
    _refuse_pairs(path, places[0] * len(films) + places[1])
    return Ratings(places[0], places[1], numbers[:, 2], numbers[:, 3])


def _parsed(path: Path) -> Integers:
    """Return the four numbers of each line, ``(ratings, 4)``.

    The C parser of pandas takes one character between columns, so each ``::`` is a column that must be empty: it is, where
    there are six colons a line, in pairs, and none of the four numbers is missing.
    """
    pandas = import_optional("pandas", extra="recommend")
    data = _bytes(path)
    try:
        table = pandas.read_csv(
            io.BytesIO(data),
            sep=":",
            header=None,
            usecols=[0, 2, 4, 6],
            dtype=np.int64,
            engine="c",
            quoting=3,
            na_filter=False,
            skip_blank_lines=False,
        )
    except (ValueError, OverflowError):  # pandas' own errors are ValueErrors; they do not say the line
        _find_fault(path, data)
    numbers: Integers = table.to_numpy()
    lines = data.count(b"\n") + (not data.endswith(b"\n"))
    if (len(numbers), data.count(b":"), data.count(b"::")) != (lines, 6 * lines, 3 * lines):
        _find_fault(path, data)
    return numbers


def _find_fault(path: Path, data: bytes) -> NoReturn:
    """Read line by line to say which one does not fit the format."""
    for line, text in enumerate(data.split(b"\n"), 1):
        if not text and line > 1 and line > data.count(b"\n"):
            break  # what follows the last line's end
        _check_text(text, path, line)
        fields = text.decode("latin-1").removesuffix("\r").split(SEPARATOR)
        _check_count(path, line, fields, 4, RATING_FIELDS)
        for field, name in zip(fields, RATING_FIELDS.split(SEPARATOR), strict=True):
            _number(field, name, f"{path}, line {line}")
    raise DataError(f"{path} cannot be read as {RATING_FIELDS}: write one rating a line, whole numbers without spaces")


def _refuse_pairs(path: Path, pairs: Integers) -> None:
    """Refuse a user's second rating of the same film."""
    ordered = np.sort(pairs)
    again = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(again):
        lines = np.flatnonzero(pairs == pairs[np.isin(pairs, again)][0]) + 1
        _complain(
            path, int(lines[1]), f"the same user has rated the same film in line {lines[0]}: keep one of the lines"
        )


def _lines(path: Path, count: int, format_: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the number and the fields of each line."""
    data = _bytes(path)
    _refuse_utf8(path, data)
    texts = data.split(b"\n")
    if not texts[-1]:
        texts.pop()
    for line, text in enumerate(texts, 1):
        _check_text(text, path, line)
        fields = text.decode("latin-1").removesuffix("\r").split(SEPARATOR)
        _check_count(path, line, fields, count, format_)
        yield line, fields


def _check_count(path: Path, line: int, fields: Sequence[str], count: int, format_: str) -> None:
    if fields == [""]:
        raise DataError(f"{path}, line {line} is empty: remove it")
    if len(fields) != count:
        shown = "::".join(fields)
        shown = f"{shown[:60]}..." if len(shown) > 60 else shown
        raise DataError(
            f"{path}, line {line} has {len(fields)} field{'s' if len(fields) > 1 else ''} ({shown!r}) where {count} are due: "
            f"write {format_}"
        )


def _check_text(text: bytes, path: Path, line: int) -> None:
    """Refuse control characters: they mean that the file is in another encoding, or no text at all."""
    controls = [character for character in text.removesuffix(b"\r") if character < 32 or 127 <= character < 160]
    if controls:
        remedy = "save the file as ISO 8859-1 (latin-1), as the official one is"
        raise DataError(f"{path}, line {line}: the byte 0x{controls[0]:02x} is no character of ISO 8859-1: {remedy}")


def _refuse_utf8(path: Path, data: bytes) -> None:
    """Refuse letters beyond ASCII that are valid UTF-8: read as latin-1 each would become two wrong ones."""
    if data.isascii():
        return
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return
    line = next(line for line, text in enumerate(data.split(b"\n"), 1) if not text.isascii())
    remedy = f"convert it: iconv -f UTF-8 -t ISO-8859-1 {path.name}"
    raise DataError(f"{path}, line {line}: the text is UTF-8, and the format is ISO 8859-1 (latin-1): {remedy}")


def _bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror}: it belongs to the set, beside the two others"
        ) from error
    if not data.strip():
        raise DataError(f"{path} is empty: unpack the set again, or make an example: duoka data make movielens")
    return data


def _number(field: str, name: str, where: str) -> int:
    """Return a whole number, 0 or more."""
    if not (field.isascii() and field.isdigit() and len(field) < 19):
        raise DataError(f"{where}: {name} is {field!r}: it must be a whole number, 0 or more")
    return int(field)


def _one_of(value: Any, names: dict[Any, str], what: str, where: str) -> str:
    if value not in names:
        raise DataError(f"{where}: the {what} is {value!r}: there is {', '.join(map(str, names))}")
    return names[value]


def _refuse_again(number: int, found: dict[int, Any], what: str, where: str) -> None:
    if number in found:
        raise DataError(f"{where}: {what} {number} is in line {found[number][0]} already: keep one of the lines")


def _complain(path: Path, line: int, what: str) -> NoReturn:
    raise DataError(f"{path}, line {line}: {what}")
