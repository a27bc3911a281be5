"""Time series with a regular step: their reading from a table with dates, and their split into sliding windows."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from duoka.data.sample_fetch import identity_collate
from duoka.errors import ConfigError, DataError
from duoka.log import logger
from duoka.recipes.datasets.csv_table import CsvTable, Standardization, join_first
from duoka.recipes.datasets.download import RemoteFile
from duoka.utils.imports import import_optional

HOUR_S, DAY_S = 3600, 86_400
ETT_URL = "https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small/"
ETT_FILES = {
    "ETTh1": (2_589_657, "f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066"),
    "ETTh2": (2_417_960, "a3dc2c597b9218c7ce1cd55eb77b283fd459a1d09d753063f944967dd6b9218b"),
    "ETTm1": (10_360_719, "6ce1759b1a18e3328421d5d75fadcb316c449fcd7cec32820c8dafda71986c9e"),
    "ETTm2": (9_677_236, "db973ca252c6410a30d0469b13d696cf919648d0f3fd588c60f03fdbdbadd1fd"),
}
"""Bytes and SHA-256 checksum of each file. Source: https://github.com/zhouhaoyi/ETDataset (CC BY-ND 4.0)."""
UNEQUAL_STEPS = {
    "MS": 31, "ME": 31, "2MS": 62, "2ME": 62, "3MS": 92, "3ME": 92, "6MS": 184, "6ME": 184, "12MS": 366, "12ME": 366, "B": 3,
}  # fmt: skip
"""Regular steps of unequal length and their most days: one month to a year from first or last days, and working days."""
DAY_AND_MONTH = re.compile(r"(\d{1,2})([./-])(\d{1,2})\2(\d{2}|\d{4})(?!\d)(.*)")
"""A date that begins with its day or its month."""
CHINESE_UNITS = {ord("年"): "-", ord("月"): "-", ord("日"): " "}
"""Replacements that make ``2016年7月1日`` a date that pandas reads."""


@dataclass(frozen=True)
class TimeSeries:
    """Values at regular dates."""

    name: str
    """The file's name without its suffix."""
    dates: Any
    """``pandas.DatetimeIndex`` with its ``freq``."""
    values: Tensor
    """float64 ``(steps, columns)``."""
    columns: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.values)

    @property
    def frequency(self) -> str:
        """The step between dates as pandas writes it, such as ``"h"`` or ``"15min"``."""
        return str(self.dates.freqstr)

    @property
    def step_s(self) -> float:
        """Mean seconds from one date to the next."""
        return float((self.dates[-1] - self.dates[0]).total_seconds()) / max(1, len(self.dates) - 1)

    def season_length(self) -> int:
        """Return the steps of a day; of a week for daily data, and of a year for longer steps."""
        if self.step_s < DAY_S:
            return max(1, round(DAY_S / self.step_s))
        days = 7 if self.step_s < 7 * DAY_S else 365.25
        return max(1, round(days * DAY_S / self.step_s))

    def future_dates(self, steps: int) -> Any:
        """Return the next ``steps`` dates after the last one."""
        pandas = import_optional("pandas", extra="forecast")
        return pandas.date_range(self.dates[-1], periods=steps + 1, freq=self.dates.freq)[1:]


def locate_ett(name: str, root: str | Path, *, download: bool = True) -> Path:
    """Return the file of the Electricity Transformer Temperature set ``name`` in ``root``, downloaded if it is missing.

    Raises DataError if the file is missing and ``download`` is off, or its checksum is wrong.
    """
    remote = RemoteFile(f"{ETT_URL}{name}.csv", *ETT_FILES[name], alternative=", or give your own file with --csv")
    return remote.locate(Path(root), download=download)


def series_from_table(
    table: CsvTable, date: str, indices: Sequence[int], *, fill: bool = False, frequency: str | None = None
) -> TimeSeries:
    """Return the columns ``indices`` of ``table`` as a series over its column ``date``, a name or position.

    ``fill`` interpolates missing values and missing dates. ``frequency`` is the pandas frequency to prefer if the dates fit
    several.

    Raises ConfigError if there is no column ``date``, and DataError if a cell is not a date, dates do not rise or are not
    regular, or values are missing or not numbers.
    """
    dates = _read_dates(table, table.find_column(date))
    values = table.numbers(indices, fill=fill, positions=dates.asi8)
    dates, values = _make_regular(table, dates, values, fill, frequency)
    return TimeSeries(table.path.stem, dates, values, tuple(table.columns[index] for index in indices))


def calendar_features(dates: Any, step_s: float) -> Tensor:
    """Return float32 ``(steps, features)`` from -0.5 to 0.5: positions in the hour, day, week, month and year.

    Minute, hour and weekday are included for steps shorter than an hour, a day and a week. For steps of a minute up
    to a day, the paper's code has the same features.
    """
    features = [
        (step_s < HOUR_S, dates.minute / 59),
        (step_s < DAY_S, dates.hour / 23),
        (step_s < 7 * DAY_S, dates.day_of_week / 6),
        (True, (dates.day - 1) / 30),
        (True, (dates.day_of_year - 1) / 365),
    ]
    columns = [np.asarray(feature) - 0.5 for included, feature in features if included]
    return torch.from_numpy(np.stack(columns, axis=1)).float()


def _read_dates(table: CsvTable, index: int) -> Any:
    pandas = import_optional("pandas", extra="forecast")
    cells, lines = table.text(index), table.lines
    where = f"column {index + 1} ({table.columns[index]})"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # formats that pandas deprecates
            ordered = pandas.Series(_year_first(cells, f"{table.path}, {where}"))
            dates = pandas.DatetimeIndex(pandas.to_datetime(ordered, format="mixed", errors="coerce"))
    except (ValueError, TypeError) as error:
        raise DataError(f"{table.path}, {where}: dates of several time zones: write all in one, such as UTC") from error
    if len(wrong := np.flatnonzero(dates.isna())):
        faults = join_first([f"{cells[row]!r} in line {lines[row]}" for row in wrong])
        raise DataError(
            f"{table.path}, {where}: no date: {faults}; write dates as 2016-07-01 00:00:00, or name another column "
            "with --date"
        )
    if len(late := np.flatnonzero(np.diff(dates.asi8) <= 0)):
        row = int(late[0]) + 1
        relation = "the same date as" if dates[row] == dates[row - 1] else "an earlier date than"
        raise DataError(
            f"{table.path}, line {lines[row]}, {where}: {cells[row]} is {relation} {cells[row - 1]} in line "
            f"{lines[row - 1]}: sort the rows by date, and keep one of each"
        )
    return dates


def _year_first(cells: Sequence[str], where: str) -> list[str]:
    """Return dates with the year first; a time without a date becomes empty.

    The whole column decides which number is the day: a number above 12 in one row, or points as separators.
    """
    cells = ["" if re.match(r"\d{1,2}:", cell) else cell.translate(CHINESE_UNITS).strip() for cell in cells]
    matches = [DAY_AND_MONTH.fullmatch(cell) for cell in cells]
    found = [match for match in matches if match]
    if not found:
        return cells
    day_first = found[0][2] == "." or max(int(match[1]) for match in found) > 12
    if len(found[0][4]) == 2 or not (day_first or max(int(match[3]) for match in found) > 12):
        raise DataError(f"{where}: {found[0][0]!r} may be read in several ways: write dates as 2016-07-01 00:00:00")
    day, month = (1, 3) if day_first else (3, 1)
    return [
        f"{match[4]}-{match[month]:0>2}-{match[day]:0>2}{match[5]}" if match else cell
        for cell, match in zip(cells, matches, strict=True)
    ]


def _make_regular(table: CsvTable, dates: Any, values: Tensor, fill: bool, frequency: str | None) -> tuple[Any, Tensor]:
    """Return dates with a frequency and their values; missing dates are interpolated if ``fill`` allows it."""
    if len(dates) < 3:
        raise DataError(f"{table.path} has too few rows, {len(dates)}: a series needs at least 3")
    regular = _regular_dates(dates, frequency)
    if regular is None:
        raise DataError(f"{table.path}, {_explain_irregular(table, dates)}")
    missing = len(regular) - len(dates)
    if not missing:
        return regular, values
    if not fill:
        row = int(np.flatnonzero(regular[: len(dates)] != dates)[0])
        raise DataError(
            f"{table.path}, line {table.lines[row]}: {dates[row]} follows {dates[row - 1]} in line {table.lines[row - 1]}, "
            f"and {regular[row]} is missing between them ({missing:,} missing in all): add the missing rows, or give "
            "--fill true, which interpolates them"
        )
    logger.info("%s: interpolated missing rows: %s", table.path, f"{missing:,}")
    columns = [np.interp(regular.asi8, dates.asi8, column.numpy()) for column in values.unbind(1)]
    return regular, torch.from_numpy(np.stack(columns, axis=1))


def _regular_dates(dates: Any, frequency: str | None) -> Any:
    """Return the shortest regular range that contains ``dates``; ``None`` if it has over twice as many dates."""
    pandas = import_optional("pandas", extra="forecast")
    usual, day = _most_common_step(dates), pandas.Timedelta(days=1)
    steps = [(usual, usual)] if frequency is None else [(frequency, _longest_step(frequency)), (usual, usual)]
    if usual >= day:
        steps += [(step, days * day) for step, days in UNEQUAL_STEPS.items()]
    best = None
    for step, longest in steps:
        if (dates[-1] - dates[0]) / longest > 2 * len(dates):
            continue  # all dates between would take long to make, and be too many
        regular = pandas.date_range(dates[0], dates[-1], freq=step)
        shorter = len(regular) <= 2 * len(dates) if best is None else len(regular) < len(best)
        if shorter and bool(dates.isin(regular).all()):
            best = regular
    return None if best is None else best.as_unit(dates.unit)


def _longest_step(frequency: str) -> Any:
    """Return the longest time from one date to the next at a frequency of pandas."""
    pandas = import_optional("pandas", extra="forecast")
    try:
        return pandas.Timedelta(pandas.tseries.frequencies.to_offset(frequency))
    except ValueError:  # its steps are unequal
        return pandas.Timedelta(days=UNEQUAL_STEPS.get(frequency, 1))


def _explain_irregular(table: CsvTable, dates: Any) -> str:
    """Name the first date between two steps, or the one after a gap that is too long to fill."""
    usual = _most_common_step(dates)
    steps = dates[1:] - dates[:-1]
    between = np.flatnonzero(steps % usual != usual * 0)
    row = int(between[0] if len(between) else np.argmax(steps)) + 1
    fault = f"line {table.lines[row]}: {dates[row]} comes {steps[row - 1]} after line {table.lines[row - 1]}"
    if len(between):
        return (
            f"{fault}, no whole number of the usual steps of {usual}: correct the dates; only missing rows are filled"
        )
    return (
        f"{fault}, and the usual step is {usual}: more rows are missing than there are: correct the dates or drop rows"
    )


def _most_common_step(dates: Any) -> Any:
    return dates.to_series().diff().mode()[0]


class SlidingWindows(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Data set whose sample ``i`` is ``(history, marks, future)`` of the window that starts at step ``i``.

    Args:
        values: float32 ``(steps, columns)``.
        marks: calendar features, float32 ``(steps, features)``.
        past: steps of the history.
        horizon: steps of the future.
        targets: indices of the columns to forecast.
    """

    def __init__(self, values: Tensor, marks: Tensor, past: int, horizon: int, targets: Sequence[int]) -> None:
        self.values, self.marks = values, marks
        self.past, self.horizon, self.targets = past, horizon, list(targets)

    def __len__(self) -> int:
        return max(0, len(self.values) - self.past - self.horizon + 1)

    @property
    def views(self) -> tuple[Tensor, Tensor]:
        """All windows of values and of marks, ``(windows, past + horizon, columns)``, in the memory of the series."""
        length = self.past + self.horizon
        return self.values.unfold(0, length, 1).transpose(1, 2), self.marks.unfold(0, length, 1).transpose(1, 2)

    @property
    def futures(self) -> Tensor:
        """The true future of all windows, ``(windows, horizon, targets)``."""
        return self.values[self.past :, self.targets].unfold(0, self.horizon, 1).transpose(1, 2)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        history, marks, future = self.__getitems__([index])
        return history[0], marks[0], future[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return a batch: ``(batch, past, columns)``, marks, ``(batch, horizon, targets)``."""
        values, marks = (view[torch.as_tensor(indices)] for view in self.views)
        return values[:, : self.past], marks, values[:, self.past :, self.targets].contiguous()


@dataclass(frozen=True)
class SeriesSplit:
    """A standardized series in three parts; a window's history may reach into the part before."""

    train: SlidingWindows
    validation: SlidingWindows
    test: SlidingWindows
    standardization: Standardization
    ends: tuple[int, int, int]
    """The steps at which the three parts end."""

    @classmethod
    def from_series(
        cls,
        series: TimeSeries,
        split: str,
        past: int,
        horizon: int,
        targets: Sequence[int],
        standardization: Standardization | None = None,
    ) -> SeriesSplit:
        """Split ``series``; the future of each part's first window starts where the part starts, as in the paper.

        ``split`` is ``"paper"`` (12, 4 and 4 months of ETT), ``"ratio"`` (70, 10 and 20 %), or ``"auto"``: the paper's if
        the file is called ETTh... or ETTm... and is long enough. ``past``, ``horizon`` and ``targets`` are those of
        ``SlidingWindows``. Without ``standardization``, the training part's is computed.

        Raises ConfigError if the paper's split does not fit the series, and DataError if a part is too short for one window
        or no target changes in the training part.
        """
        ends = _part_ends(series, split)
        bounds = list(zip((0, *ends), ends, strict=False))
        for part, (start, end) in zip(("training", "validation", "test"), bounds, strict=True):
            needed = past + horizon if start == 0 else horizon  # later histories start in the part before
            if end - start < needed:
                raise DataError(
                    f"{series.name} has {len(series):,} rows, {end - start:,} of them for {part}, which needs {needed:,} at "
                    f"least (seq_len {past}, pred_len {horizon}): use more rows, or a smaller --seq_len or --pred_len"
                )
        training = series.values[: ends[0]]
        known = training[:, list(targets)]
        if bool((known == known[0]).all()):
            raise DataError(
                f"{series.name}: {join_first([series.columns[index] for index in targets])} never changes in the "
                f"{len(training):,} training rows, so there is nothing to forecast: choose other --targets"
            )
        standardization = standardization or Standardization.fit(training, series.columns)
        values, marks = standardization.transform(series.values), calendar_features(series.dates, series.step_s)
        slices = [slice(max(0, start - past), end) for start, end in bounds]
        parts = [SlidingWindows(values[part], marks[part], past, horizon, targets) for part in slices]
        return cls(parts[0], parts[1], parts[2], standardization, ends)


def loader(samples: SlidingWindows, batch_size: int, *, shuffle: bool = False) -> DataLoader[Any]:
    """Return a loader of ``samples``, whose ``__getitems__`` already returns whole batches."""
    return DataLoader(samples, batch_size=batch_size, shuffle=shuffle, collate_fn=identity_collate)


def _part_ends(series: TimeSeries, split: str) -> tuple[int, int, int]:
    rows = len(series)
    if split == "paper" or (split == "auto" and series.name[:4].lower() in ("etth", "ettm")):
        month = 30 * 24 * round(HOUR_S / series.step_s)
        if series.step_s <= HOUR_S and rows >= 20 * month:
            return 12 * month, 16 * month, 20 * month
        if split == "paper":
            raise ConfigError(
                f"split is 'paper', which takes 20 months of 30 days in steps of an hour or less; {series.name} has "
                f"{rows:,} steps of {series.frequency}: use --split ratio"
            )
    train, test = int(rows * 0.7), int(rows * 0.2)
    return train, rows - test, rows
