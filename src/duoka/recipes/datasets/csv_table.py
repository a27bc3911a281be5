"""CSV files as people have them: any usual separator, with or without a byte-order mark, every fault by line and column."""

from __future__ import annotations

import csv
import difflib
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from duoka.errors import ConfigError, DataError, StorageError
from duoka.log import logger

__all__ = ["Table", "listed", "read", "write"]

SEPARATORS = ",;\t|"
MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "-", "?", "#n/a"})
"""Cells that say that there is no value, in small letters."""
SHOWN = 5
"""How many faults of one kind a message names."""


@dataclass(frozen=True)
class Table:
    """The cells of a file as text, with the line that each row stands in."""

    path: Path
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    lines: tuple[int, ...]
    decimal_comma: bool = False
    """Whether ``1,5`` is a number: where a semicolon separates, as spreadsheets in half of Europe write."""

    def __len__(self) -> int:
        return len(self.rows)

    def find(self, wanted: str) -> list[int]:
        """Return the places of columns given by name or position, ``"OT"``, ``"1-10"``, ``"HUFL,3"``; positions count from 1.

        Raises:
            ConfigError: there is no such column; the message lists those there are.

        """
        if wanted in self.columns:
            return [self.columns.index(wanted)]  # a name may hold commas
        found: list[int] = []
        for word in filter(None, (part.strip() for part in wanted.split(","))):
            found += [place for place in self._places(word) if place not in found]
        if not found:
            raise ConfigError(f"{wanted!r} names no column of {self.path}: {self._offer('')}")
        return found

    def find_name(self, name: str) -> int:
        """Return the place of the column called ``name``.

        Raises:
            ConfigError: there is none.

        """
        if name not in self.columns:
            raise ConfigError(f"{self.path} has no column {name!r}: {self._offer(name)}")
        return self.columns.index(name)

    def find_one(self, wanted: str) -> int:
        """Return the place of the one column given by name or position.

        Raises:
            ConfigError: there is no such column, or there are several.

        """
        places = self.find(wanted)
        if len(places) > 1:
            raise ConfigError(f"{wanted!r} names {len(places)} columns of {self.path}: name one")
        return places[0]

    def _places(self, word: str) -> list[int]:
        if word in self.columns:
            return [self.columns.index(word)]
        span = re.fullmatch(r"(\d+)(?:-(\d+))?", word)
        first, last = (int(span[1]), int(span[2] or span[1])) if span else (0, 0)
        if not 1 <= first <= last <= len(self.columns):
            raise ConfigError(f"{self.path} has no column {word!r}: {self._offer(word)}")
        return list(range(first - 1, last))

    def _offer(self, word: str) -> str:
        close = [name for name in self.columns if name.lower() == word.lower()]
        close = close or difflib.get_close_matches(word, self.columns, n=1)
        return f"did you mean {close[0]!r}?" if close else f"its {len(self.columns)} columns are {listed(self.columns)}"

    def numbers(self, places: Sequence[int], *, fill: bool = False, at: np.ndarray | None = None) -> Tensor:
        """Return the columns at ``places`` as float64 ``(rows, columns)``.

        Args:
            places: of the columns, from 0.
            fill: whether missing values are interpolated between the rows before and after (beyond the first and last known
                value: that value again).
            at: where the rows stand on the axis along which they are interpolated, rising; ``None``: one apart.

        Raises:
            DataError: cells that are no numbers, or are missing and not to be filled; the message names line and column.

        """
        values = np.empty((len(self.rows), len(places)))
        missing: list[tuple[int, int]] = []
        for index, place in enumerate(places):
            values[:, index], gaps = self._column(place)
            missing += [(row, place) for row in gaps]
            if fill and gaps:
                values[:, index] = self._filled(values[:, index], place, at)
        if missing and not fill:
            cells = [self._cell(row, place) for row, place in sorted(missing)]
            raise DataError(
                f"{self.path} has {_count(len(missing), 'missing value')}: {listed(cells)}; complete or remove these rows, or "
                "give --fill true, which interpolates between the rows before and after"
            )
        if missing:
            logger.info("%s: interpolated %s", self.path, _count(len(missing), "missing value"))
        return torch.from_numpy(values)

    def _column(self, place: int) -> tuple[np.ndarray, list[int]]:
        """Return a column's values, NaN where one is missing, and the rows where one is."""
        cells = [row[place].strip() for row in self.rows]
        if self.decimal_comma:
            cells = [cell.replace(",", ".") for cell in cells]
        gaps = [row for row, cell in enumerate(cells) if cell.lower() in MISSING]
        for row in gaps:
            cells[row] = "nan"
        values = np.array([_number(cell) for cell in cells])
        wrong = np.flatnonzero(~np.isfinite(values))
        if len(wrong) > len(gaps):
            bad = [int(row) for row in wrong if int(row) not in set(gaps)]
            cells_named = [f"{self.rows[row][place]!r} in {self._cell(row, place)}" for row in bad]
            remedy = "correct them, or choose other columns"
            if not self.decimal_comma and any("," in self.rows[row][place] for row in bad):
                remedy = "write 1.5 for 1,5, which is a number only where semicolons separate the columns"
            raise DataError(
                f"{self.path} has {_count(len(bad), 'cell')} where a number should be: {listed(cells_named)}; {remedy}"
            )
        return values, gaps

    def _filled(self, values: np.ndarray, place: int, at: np.ndarray | None) -> np.ndarray:
        known = np.flatnonzero(np.isfinite(values))
        if not len(known):
            raise DataError(f"{self.path}: column {self.columns[place]!r} has no value at all: leave it out")
        rows = np.arange(len(values)) if at is None else at
        filled: np.ndarray = np.interp(rows, rows[known], values[known])
        return filled

    def _cell(self, row: int, place: int) -> str:
        return f"line {self.lines[row]}, column {place + 1} ({self.columns[place]})"


def read(path: str | Path) -> Table:
    """Read a file of columns whose first line has their names.

    The separator (comma, semicolon, tab or bar) is the one that the first line has most of, quoted names aside; blank lines
    are passed over.

    Raises:
        DataError: the file is missing, empty, not UTF-8, without a line of names, or has rows of another length.

    """
    path = Path(path)
    text = _text(path)
    header = re.sub(r'"[^"]*"', "", text.lstrip("\n").partition("\n")[0])
    separator = max(SEPARATORS, key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
    rows, lines, before = [], [], 0
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                rows.append(tuple(row))
                lines.append(before + 1)
            before = reader.line_num
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}: is it a CSV file? Save it as one") from error
    columns = tuple(name.strip() for name in rows[0]) if rows else ()
    _check_header(path, columns, lines[0] if lines else 1)
    _check_lengths(path, columns, rows[1:], lines[1:], separator)
    return Table(path, columns, tuple(rows[1:]), tuple(lines[1:]), decimal_comma=separator == ";")


def write(path: Path, columns: Sequence[str], rows: Sequence[Sequence[object]], *, digits: int = 10) -> None:
    """Write a table, atomically; floats with ``digits`` digits, so that small changes of large numbers are seen.

    Raises:
        StorageError: the file cannot be written.

    """
    from duoka.checkpoint import atomic_write

    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([f"{cell:.{digits}g}" if isinstance(cell, float) else cell for cell in row] for row in rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make the folder {path.parent}: {error}: choose another place") from error
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


def listed(items: Sequence[str]) -> str:
    """Return the first few of ``items`` in one sentence, and how many more there are.

    >>> listed(["a", "b", "c", "d", "e", "f", "g"])
    'a; b; c; d; e; and 2 more'
    """
    shown = list(items[:SHOWN])
    return "; ".join(shown if len(items) <= SHOWN else [*shown, f"and {len(items) - SHOWN:,} more"])


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}: {_near(path)}") from error
    except IsADirectoryError as error:
        raise DataError(f"{path} is a folder: give a CSV file") from error
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror}: give another file, or make this one readable"
        ) from error
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: not UTF-8 text: save it as CSV in UTF-8") from error


def _near(path: Path) -> str:
    """Say which file may have been meant by one that is not there."""
    there = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, there, n=1, cutoff=0.8)
    return f"did you mean {path.with_name(close[0])}?" if close else "check the path"


def _check_header(path: Path, columns: tuple[str, ...], line: int) -> None:
    if not columns:
        raise DataError(f"{path} is empty: the first line must hold the columns' names")
    if all(math.isfinite(_number(name)) for name in columns):
        raise DataError(
            f"{path}, line {line}: numbers where the columns' names should be: add a line of names above them"
        )
    for place, name in enumerate(columns):
        if not name or name in columns[:place]:
            what = f"the name {name!r} again" if name else "no name"
            raise DataError(f"{path}, line {line}: column {place + 1} has {what}: give each column a name of its own")


def _check_lengths(
    path: Path, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]], lines: Sequence[int], separator: str
) -> None:
    if not rows:
        raise DataError(f"{path} has names of columns and no row below them: add rows of numbers")
    for row, line in zip(rows, lines, strict=True):
        if len(row) != len(columns):
            if len(row) > len(columns):
                where = f"the first that is too much is column {len(columns) + 1}, {row[len(columns)]!r}"
            else:
                where = f"the first that is missing is column {len(row) + 1} ({columns[len(row)]})"
            name = {"\t": "tab"}.get(separator, separator)
            raise DataError(
                f"{path}, line {line}: {_count(len(row), 'column')} where the first line has {len(columns)}; {where}: correct "
                f"the line (columns are separated by {name!r})"
            )


def _number(cell: str) -> float:
    """Return the number that ``cell`` is, or infinity where it is none: ``1_000`` is none in a CSV file."""
    try:
        return float(cell) if "_" not in cell else math.inf
    except ValueError:
        return math.inf


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
