"""CSV files with a header line, as text with each row's line for messages, and the standardization of their numbers."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from duoka.errors import ConfigError, DataError
from duoka.log import logger
from duoka.utils.files import atomic_write, read_file
from duoka.utils.imports import import_optional
from duoka.utils.text import did_you_mean, plural

SEPARATORS = ",;\t|"
MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "-", "?", "#n/a"})
"""Lower-case cells that stand for a missing value."""
MAX_BYTES = 1_000_000_000
"""Largest file that is read."""
MAX_LISTED = 5
"""Faults of one kind that a message lists."""


@dataclass(frozen=True)
class CsvTable:
    """The cells of a CSV file as text."""

    path: Path
    frame: Any
    """``pandas.DataFrame`` of text; its index holds the line of each row in the file."""
    decimal_comma: bool = False
    """Whether ``1,5`` is a number, as in files that spreadsheets of half of Europe separate by semicolons."""

    def __len__(self) -> int:
        return len(self.frame)

    @property
    def columns(self) -> tuple[str, ...]:
        """The column names."""
        return tuple(self.frame.columns)

    @property
    def lines(self) -> list[int]:
        """The line of each row in the file."""
        return list(self.frame.index)

    def text(self, index: int) -> list[str]:
        """Return the cells of column ``index`` without surrounding blanks."""
        return list(self.frame.iloc[:, index].str.strip())

    def find_columns(self, columns: str) -> list[int]:
        """Return the indices of columns given by name or by position from 1: ``"OT"``, ``"1-10"``, ``"HUFL,3"``.

        Raises ConfigError if there is no such column; the message lists the columns of the file.
        """
        if columns in self.columns:
            return [self.columns.index(columns)]  # a name may contain commas
        found: list[int] = []
        for word in filter(None, map(str.strip, columns.split(","))):
            span = re.fullmatch(r"(\d+)(?:-(\d+))?", word)
            if word in self.columns or not span:
                found.append(self.find_name(word))
            else:
                first, last = int(span[1]), int(span[2] or span[1])
                if not 1 <= first <= last <= len(self.columns):
                    raise ConfigError(f"{self.path} has no column {word!r}: {self._suggestion(word)}")
                found += range(first - 1, last)
        if not found:
            raise ConfigError(f"{columns!r} names no column of {self.path}: {self._suggestion('')}")
        return list(dict.fromkeys(found))

    def find_column(self, column: str) -> int:
        """Return the index of one column given by name or by position from 1.

        Raises ConfigError if there is no such column, or ``column`` names several.
        """
        indices = self.find_columns(column)
        if len(indices) > 1:
            raise ConfigError(f"{column!r} names {len(indices)} columns of {self.path}: name one")
        return indices[0]

    def find_name(self, name: str) -> int:
        """Return the index of the column called ``name``. Raises ConfigError if there is no such column."""
        if name not in self.columns:
            raise ConfigError(f"{self.path} has no column {name!r}: {self._suggestion(name)}")
        return self.columns.index(name)

    def _suggestion(self, word: str) -> str:
        same = [name for name in self.columns if name.lower() == word.lower()]
        hint = f"did you mean {same[0]!r}?" if same else did_you_mean(word, self.columns)
        return hint or f"its {len(self.columns)} columns are {join_first(self.columns)}"

    def numbers(self, indices: Sequence[int], *, fill: bool = False, positions: np.ndarray | None = None) -> Tensor:
        """Return columns as float64 ``(rows, columns)``.

        ``fill`` interpolates missing values linearly between rows at the rising ``positions``, by default one apart, and
        repeats the first and the last known value outward.

        Raises DataError if a cell is not a number, or is missing without ``fill``; the message names line and column.
        """
        pandas = import_optional("pandas", extra="forecast")
        text = self.frame.iloc[:, list(indices)].apply(lambda column: column.str.strip())
        missing = text.apply(lambda column: column.str.lower().isin(MISSING))
        values = text.mask(missing)
        if self.decimal_comma:
            values = values.apply(lambda column: column.str.replace(",", "."))
        values = values.apply(pandas.to_numeric, errors="coerce").astype("float64")
        self._check_numbers(text, missing, np.isfinite(values), indices)
        if missing.any(axis=None):
            values = self._fill(values, missing, indices, fill, positions)
        return torch.tensor(values.to_numpy())

    def _check_numbers(self, text: Any, missing: Any, is_number: Any, indices: Sequence[int]) -> None:
        wrong = np.argwhere(~(is_number | missing).to_numpy())
        if not len(wrong):
            return
        cells = [f"{text.iat[row, column]!r} in {self._cell(row, indices[column])}" for row, column in wrong]
        remedy = "correct them, or choose other columns"
        if not self.decimal_comma and any("," in text.iat[row, column] for row, column in wrong):
            remedy = "write 1.5 for 1,5, which is a number only in files that semicolons separate"
        raise DataError(
            f"{self.path} has {plural(len(wrong), 'cell')} where a number should be: {join_first(cells)}; {remedy}"
        )

    def _fill(self, values: Any, missing: Any, indices: Sequence[int], fill: bool, positions: np.ndarray | None) -> Any:
        cells = np.argwhere(missing.to_numpy())
        if not fill:
            listed = join_first([self._cell(row, indices[column]) for row, column in cells])
            raise DataError(
                f"{self.path} has {plural(len(cells), 'missing value')}: {listed}; complete or remove these rows, or "
                "give --fill true, which interpolates between the rows before and after"
            )
        if empty := list(missing.columns[missing.all()]):
            raise DataError(f"{self.path}: column {empty[0]!r} has no value at all: leave it out")
        logger.info("%s: interpolated %s", self.path, plural(len(cells), "missing value"))
        values = values.set_axis(range(len(values)) if positions is None else positions, axis=0)
        return values.interpolate("index", limit_direction="both")

    def _cell(self, row: int, index: int) -> str:
        return f"line {self.frame.index[row]}, column {index + 1} ({self.columns[index]})"


class SavedStandardization(TypedDict):
    """``Standardization`` in a file."""

    mean: list[float]
    std: list[float]


@dataclass(frozen=True)
class Standardization:
    """Mean and population standard deviation of each column."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def fit(cls, rows: Tensor, names: Sequence[str]) -> Standardization:
        """Return the statistics of ``rows (rows, columns)``; a constant column is only shifted, with a warning.

        Raises DataError if the squares of a column's numbers overflow.
        """
        std, mean = torch.std_mean(rows.double(), dim=0, correction=0)
        for index in (~std.isfinite()).nonzero().flatten().tolist():
            largest = float(rows[:, index].abs().max())
            raise DataError(
                f"column {names[index]!r} has numbers as large as {largest:.3g}, which overflow: use a larger unit"
            )
        constant = (rows == rows[0]).all(0) | (std == 0)
        for index in constant.nonzero().flatten().tolist():
            logger.warning("column %r is %g in every training row, and becomes 0", names[index], mean[index])
        mean = torch.where(constant, rows[0].double(), mean)  # the computed mean may differ by rounding
        return cls(tuple(mean.tolist()), tuple(std.masked_fill(constant, 1).tolist()))

    @classmethod
    def from_dict(cls, saved: SavedStandardization, columns: Sequence[str]) -> Standardization:
        """Return the statistics of ``columns`` that a file has.

        Raises DataError if there are not as many, or a deviation is not above 0.
        """
        mean, std = tuple(saved["mean"]), tuple(saved["std"])
        if not len(mean) == len(std) == len(columns) or min(std, default=0) <= 0:
            raise DataError(
                f"the run's results.json has {len(mean)} means and {len(std)} deviations above 0 for {len(columns)} columns: "
                "correct it, or train a new run"
            )
        return cls(mean, std)

    def transform(self, values: Tensor) -> Tensor:
        """Return ``values (..., columns)`` standardized, as float32; the arithmetic is float64, for numbers far from 0."""
        mean, std = torch.tensor((self.mean, self.std), dtype=torch.float64).unbind()
        return ((values.double() - mean) / std).float()

    def inverse_transform(self, values: Tensor) -> Tensor:
        """Return standardized ``values (..., columns)`` in their original units, as float64."""
        mean, std = torch.tensor((self.mean, self.std), dtype=torch.float64).unbind()
        return values.double() * std + mean

    def select(self, indices: Sequence[int]) -> Standardization:
        """Return the statistics of some columns."""
        mean, std = (tuple(values[index] for index in indices) for values in (self.mean, self.std))
        return Standardization(mean, std)


def read(path: str | Path) -> CsvTable:
    """Read a CSV file whose first line names the columns; blank lines are skipped.

    The separator is the one of comma, semicolon, tab and bar that occurs most often in the header outside quotes.

    Raises DataError if the file is missing, empty, not UTF-8, without a header, or has a row of another length.
    """
    pandas = import_optional("pandas", extra="forecast")
    path = Path(path)
    text = _read_text(path)
    header = re.sub(r'"[^"]*"', "", text.lstrip("\n").partition("\n")[0])
    separator = max(SEPARATORS, key=header.count)
    lines, rows = _parse(path, text, separator)
    names = [name.strip() for name in rows[0]] if rows else []
    _check_header(path, names, lines[0] if lines else 1, pandas)
    _check_lengths(path, names, rows[1:], lines[1:], separator)
    frame = pandas.DataFrame(rows[1:], columns=names, index=lines[1:])
    return CsvTable(path, frame, decimal_comma=separator == ";")


def write(path: Path, columns: Sequence[str], rows: Sequence[Sequence[object]], *, digits: int = 10) -> None:
    """Write a table atomically, with ``digits`` significant digits of each float.

    Raises StorageError if the file cannot be written.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([f"{cell:.{digits}g}" if isinstance(cell, float) else cell for cell in row] for row in rows)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


def join_first(items: Sequence[str]) -> str:
    """Return the first items of a list as text, with the number of the others.

    >>> join_first(["a", "b", "c", "d", "e", "f", "g"])
    'a; b; c; d; e; and 2 more'
    """
    more = [f"and {len(items) - MAX_LISTED:,} more"] if len(items) > MAX_LISTED else []
    return "; ".join([*items[:MAX_LISTED], *more])


def _read_text(path: Path) -> str:
    try:
        data = read_file(path, MAX_BYTES)
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except FileNotFoundError as error:
        names = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, names, cutoff=0.8) or "check the path"
        raise DataError(f"there is no file {path}: {hint}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}: give a CSV file that is readable") from error
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: not UTF-8 text: save it as CSV in UTF-8") from error


def _parse(path: Path, text: str, separator: str) -> tuple[list[int], list[list[str]]]:
    """Return the rows that are not blank and their lines; pandas' readers lose lines and accept short rows."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
    lines, rows, line = [], [], 1
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                lines.append(line)
                rows.append(row)
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}: save the file as CSV") from error
    return lines, rows


def _check_header(path: Path, names: list[str], line: int, pandas: Any) -> None:
    if not names:
        raise DataError(f"{path} is empty: the first line must hold the columns' names")
    if np.isfinite(pandas.to_numeric(pandas.Series(names), errors="coerce")).all():
        raise DataError(f"{path}, line {line}: numbers where the columns' names should be: add a line of names above")
    for index, name in enumerate(names):
        if not name or name in names[:index]:
            fault = f"the name {name!r} again" if name else "no name"
            raise DataError(f"{path}, line {line}: column {index + 1} has {fault}: give each column its own name")


def _check_lengths(path: Path, names: list[str], rows: list[list[str]], lines: list[int], separator: str) -> None:
    if not rows:
        raise DataError(f"{path} has names of columns and no row below them: add rows of numbers")
    for row, line in zip(rows, lines, strict=True):
        if len(row) > len(names):
            fault = f"the first extra column is {len(names) + 1}, {row[len(names)]!r}"
        elif len(row) < len(names):
            fault = f"the first missing column is {len(row) + 1} ({names[len(row)]})"
        else:
            continue
        shown = "tab" if separator == "\t" else separator
        raise DataError(
            f"{path}, line {line}: {plural(len(row), 'column')} where the first line has {len(names)}; {fault}: correct "
            f"the line (columns are separated by {shown!r})"
        )
