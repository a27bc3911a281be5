"""Reader of MovieLens-1M's three files: users and films with their texts, and every rating.

The format is the official one: `users.dat`, `movies.dat` and `ratings.dat` in ISO 8859-1, with fields separated by ``::``.
A line that does not fit is a DataError with file, line and remedy. Source: F. M. Harper and J. A. Konstan, The MovieLens
Datasets, ACM TiiS 5(4), 2015, and the README of the archive.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from duoka.errors import DataError
from duoka.utils.files import read_file
from duoka.utils.imports import import_optional
from duoka.utils.text import duoka_command, plural

Integers = NDArray[np.int64]

NAMES = ("users.dat", "movies.dat", "ratings.dat")
SEPARATOR = "::"
MAX_BYTES = 1_000_000_000
"""Largest file that is read; the official ones have 25 million bytes."""
GENDERS = {"F": "female", "M": "male"}
AGES = {
    1: "under 18", 18: "18 to 24", 25: "25 to 34", 35: "35 to 44", 45: "45 to 49", 50: "50 to 55", 56: "56 or older",
}  # fmt: skip
"""Age groups by code."""
OCCUPATIONS = (
    "other or not specified", "academic or educator", "artist", "clerical or administrative",
    "college or graduate student", "customer service", "doctor or health care", "executive or managerial", "farmer",
    "homemaker", "K-12 student", "lawyer", "programmer", "retired", "sales or marketing", "scientist", "self-employed",
    "technician or engineer", "tradesman or craftsman", "unemployed", "writer",
)  # fmt: skip
"""Occupations by code."""
RATING_FIELDS = "UserID::MovieID::Rating::Timestamp"
MIN_STARS, MAX_STARS = 1, 5
CONTROL_CHARACTER = re.compile(rb"[\x00-\x1f\x7f-\x9f]")


class User(NamedTuple):
    """A line of ``users.dat``."""

    id: int
    text: str
    """Gender, age group and occupation, a line each."""


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


Entity = TypeVar("Entity", User, Film)


@dataclass(frozen=True)
class Ratings:
    """Ratings in the order of the file."""

    pairs: Integers
    """Indices of user and film ``(ratings, 2)``."""
    stars: Integers
    """1 to 5 ``(ratings,)``."""
    times: Integers
    """Seconds since 1970 ``(ratings,)``."""

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def users(self) -> Integers:
        """Indices of the users ``(ratings,)``."""
        return self.pairs[:, 0]

    @property
    def items(self) -> Integers:
        """Indices of the films ``(ratings,)``."""
        return self.pairs[:, 1]

    def select(self, rows: Integers) -> Ratings:
        """Return some of the ratings."""
        return Ratings(self.pairs[rows], self.stars[rows], self.times[rows])


def read_users(path: Path) -> tuple[User, ...]:
    """Return the users by ascending id."""

    def parse(fields: list[str], where: str) -> User:
        number = _integer(fields[0], "UserID", where)
        gender = _lookup(fields[1], GENDERS, "gender", where)
        age = _lookup(_integer(fields[2], "age", where), AGES, "age group", where)
        code = _integer(fields[3], "occupation", where)
        occupation = _lookup(code, dict(enumerate(OCCUPATIONS)), "occupation", where)
        return User(number, f"{gender}\naged {age}\n{occupation}")

    return _read_entities(path, "UserID::Gender::Age::Occupation::Zip-code", "user", parse)


def read_films(path: Path) -> tuple[Film, ...]:
    """Return the films by ascending id, each with a title and genres."""

    def parse(fields: list[str], where: str) -> Film:
        number = _integer(fields[0], "MovieID", where)
        title, genres = fields[1].strip(), tuple(genre.strip() for genre in fields[2].split("|"))
        if not title or not all(genres):
            lacking = "title" if not title else "genres" if genres == ("",) else "name for one of its genres"
            raise DataError(f"{where}: film {number} has no {lacking}: write MovieID::Title (year)::Genre|Genre")
        return Film(number, title, genres)

    return _read_entities(path, "MovieID::Title::Genres", "film", parse)


def read_ratings(path: Path, user_ids: Integers, film_ids: Integers) -> Ratings:
    """Return the ratings of known users and films; both lists of ids are ascending."""
    pandas = import_optional("pandas", extra="recommend")
    numbers = _read_numbers(path, pandas)
    columns = []
    for column, known, kind, file in ((0, user_ids, "user", NAMES[0]), (1, film_ids, "film", NAMES[1])):
        index = np.searchsorted(known, numbers[:, column]).clip(max=len(known) - 1)
        for row in np.flatnonzero(known[index] != numbers[:, column])[:1].tolist():
            remedy = f"remove the line, or add the {kind} there"
            raise DataError(f"{path}, line {row + 1}: {kind} {numbers[row, column]} is not in {file}: {remedy}")
        columns.append(index.astype(np.int64))
    stars = numbers[:, 2]
    for row in np.flatnonzero((stars < MIN_STARS) | (stars > MAX_STARS))[:1].tolist():
        raise DataError(f"{path}, line {row + 1}: the rating is {stars[row]}: it must be {MIN_STARS} to {MAX_STARS}")
    keys = columns[0] * len(film_ids) + columns[1]
    for row in np.flatnonzero(pandas.Series(keys).duplicated())[:1].tolist():
        first = int(np.argmax(keys == keys[row])) + 1
        raise DataError(
            f"{path}, line {row + 1}: the same user has rated the same film in line {first}: keep one of the lines"
        )
    return Ratings(np.stack(columns, axis=1), stars, numbers[:, 3])


def _read_numbers(path: Path, pandas: Any) -> Integers:
    """Return the four numbers of each line, ``(ratings, 4)``.

    pandas' fast C parser takes one character as separator, so each ``::`` encloses an empty column. The counts of
    colons prove that each line has exactly three pairs.
    """
    data = _read_bytes(path)
    try:
        options = {"header": None, "quoting": csv.QUOTE_NONE, "na_filter": False, "skip_blank_lines": False}
        table = pandas.read_csv(io.BytesIO(data), sep=":", usecols=[0, 2, 4, 6], dtype=np.int64, engine="c", **options)
    except (ValueError, OverflowError):  # pandas' errors are ValueErrors; they do not name the line
        _raise_first_fault(path)
    numbers: Integers = table.to_numpy()
    lines = data.count(b"\n") + (not data.endswith(b"\n"))
    if (len(numbers), data.count(b":"), data.count(b"::")) != (lines, 6 * lines, 3 * lines):
        _raise_first_fault(path)
    return numbers


def _raise_first_fault(path: Path) -> NoReturn:
    """Read the ratings line by line to find the one that does not fit the format."""
    for where, fields in _lines(path, RATING_FIELDS):
        for field, name in zip(fields, RATING_FIELDS.split(SEPARATOR), strict=True):
            _integer(field, name, where)
    raise DataError(f"{path} cannot be read as {RATING_FIELDS}: write one rating a line, whole numbers without spaces")


def _read_entities(
    path: Path, format_: str, kind: str, parse: Callable[[list[str], str], Entity]
) -> tuple[Entity, ...]:
    """Return the parsed lines by ascending id, each id once."""
    found: dict[int, tuple[str, Entity]] = {}
    for where, fields in _lines(path, format_):
        entity = parse(fields, where)
        first, known = found.setdefault(entity.id, (where, entity))
        if known is not entity:
            line = first.rpartition(", ")[2]
            raise DataError(f"{where}: {kind} {entity.id} is in {line} already: keep one of the lines")
    return tuple(found[number][1] for number in sorted(found))


def _lines(path: Path, format_: str) -> Iterator[tuple[str, list[str]]]:
    """Yield ``"PATH, line N"`` and the fields of each line."""
    data = _read_bytes(path)
    _reject_utf8(path, data)
    count = len(format_.split(SEPARATOR))
    for line, text in enumerate(data.removesuffix(b"\n").split(b"\n"), 1):
        where, text = f"{path}, line {line}", text.removesuffix(b"\r")
        if found := CONTROL_CHARACTER.search(text):  # the file has another encoding, or it is not text
            remedy = "save the file as ISO 8859-1 (latin-1), as the official one is"
            raise DataError(f"{where}: the byte 0x{found[0][0]:02x} is no character of ISO 8859-1: {remedy}")
        if not text:
            raise DataError(f"{where} is empty: remove it")
        shown = text.decode("latin-1")
        fields = shown.split(SEPARATOR)
        if len(fields) != count:
            shown = f"{shown[:60]}..." if len(shown) > 60 else shown
            raise DataError(
                f"{where} has {plural(len(fields), 'field')} ({shown!r}) where {count} are due: write {format_}"
            )
        yield where, fields


def _reject_utf8(path: Path, data: bytes) -> None:
    """Raise for non-ASCII text in valid UTF-8: read as latin-1, each letter would become two wrong ones."""
    if data.isascii():
        return
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return
    line = next(line for line, text in enumerate(data.split(b"\n"), 1) if not text.isascii())
    remedy = f"convert it: iconv -f UTF-8 -t ISO-8859-1 {path.name}"
    raise DataError(f"{path}, line {line}: the text is UTF-8, and the format is ISO 8859-1 (latin-1): {remedy}")


def _read_bytes(path: Path) -> bytes:
    try:
        data = read_file(path, MAX_BYTES)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}: it belongs beside the other two files") from error
    if not data.strip():
        raise DataError(f"{path} is empty: unpack the set again, {example_hint()}")
    return data


def _integer(field: str, name: str, where: str) -> int:
    if not (field.isascii() and field.isdigit() and len(field) < 19):
        raise DataError(f"{where}: {name} is {field!r}: it must be a whole number, 0 or more")
    return int(field)


def _lookup(code: Any, names: Mapping[Any, str], kind: str, where: str) -> str:
    if code not in names:
        raise DataError(f"{where}: the {kind} is {code!r}: choose one of {', '.join(map(str, names))}")
    return names[code]


def example_hint() -> str:
    """Return the end of a message about missing data: the command that makes an example."""
    return f"or make an example: {duoka_command('data', 'make', 'movielens')}"
