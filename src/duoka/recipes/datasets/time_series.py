"""A table with dates as a regular series: checked, cut into training, validation and test, with features of the calendar."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from duoka.errors import ConfigError, DataError
from duoka.log import logger
from duoka.recipes.datasets import ett
from duoka.recipes.datasets.csv_table import Table, listed
from duoka.recipes.datasets.sliding_windows import SlidingWindows
from duoka.recipes.datasets.standardization import Standardization
from duoka.utils.imports import import_optional

__all__ = ["SplitRows", "TimeSeries", "calendar", "series_of"]

HOUR_S, DAY_S = 3600, 86_400
UNEQUAL = ("MS", "ME", "2MS", "2ME", "3MS", "3ME", "6MS", "6ME", "12MS", "12ME", "B")
"""Steps that are regular though not equally long: months to years from first or last days, and working days."""
DAY_AND_MONTH = re.compile(r"(\d{1,2})([./-])(\d{1,2})\2(\d{2}|\d{4})(?!\d)(.*)")
"""A date that begins with its day or its month."""
CHINESE = {ord("年"): "-", ord("月"): "-", ord("日"): " "}
"""What makes ``2016年7月1日`` a date that pandas reads."""


@dataclass(frozen=True)
class TimeSeries:
    """Values at regular dates."""

    name: str
    """Of the file, without its ending."""
    dates: Any
    """``pandas.DatetimeIndex`` with its ``freq``."""
    values: Tensor
    """float64 ``(steps, columns)``."""
    columns: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.values)

    @property
    def frequency(self) -> str:
        """The dates' step in pandas' words, such as ``"h"`` or ``"15min"``."""
        return str(self.dates.freqstr)

    @property
    def step_s(self) -> float:
        """Seconds from one date to the next, on average."""
        return float((self.dates[-1] - self.dates[0]).total_seconds()) / max(1, len(self.dates) - 1)

    def season(self) -> int:
        """Return the steps of a day; for daily data of a week, for longer steps of a year."""
        if self.step_s < DAY_S:
            return max(1, round(DAY_S / self.step_s))
        days = 7 if self.step_s < 7 * DAY_S else 365.25
        return max(1, round(days * DAY_S / self.step_s))

    def after(self, steps: int) -> Any:
        """Return the dates of the ``steps`` that follow the last."""
        pandas = import_optional("pandas", extra="forecast")
        return pandas.date_range(self.dates[-1], periods=steps + 1, freq=self.dates.freq)[1:]


@dataclass(frozen=True)
class SplitRows:
    """A standardised series in three parts, whose windows all lie within the part or its past."""

    train: SlidingWindows
    validation: SlidingWindows
    test: SlidingWindows
    scaling: Standardization
    test_begins: int
    """The step that the first test window's history begins with."""

    @classmethod
    def of(
        cls,
        series: TimeSeries,
        split: str,
        past: int,
        horizon: int,
        targets: Sequence[int],
        scaling: Standardization | None = None,
    ) -> SplitRows:
        """Cut ``series``; a part's first window has its future at the part's beginning, as in the paper's code.

        Args:
            series: what is cut.
            split: ``"paper"`` (12, 4 and 4 months of ETT), ``"ratio"`` (70, 10 and 20 %), or ``"auto"``: the paper's where
                the file is called ETTh... or ETTm... and is long enough.
            past: steps of a window's history.
            horizon: steps that follow.
            targets: places of the columns that are forecast.
            scaling: what the columns are standardised by; ``None``: their statistics in the training part.

        Raises:
            ConfigError: the paper's split does not fit the series.
            DataError: a part is too short for one window, or no target ever changes in the training part.

        """
        train, validation, test = _borders(series, split)
        _check_lengths(
            series, {"training": train, "validation": validation - train, "test": test - validation}, past, horizon
        )
        known = series.values[:train, list(targets)]
        if bool((known == known[0]).all()):
            raise DataError(
                f"{series.name}: {listed([series.columns[place] for place in targets])} never changes in the {train:,} "
                "training rows, so there is nothing to forecast: choose other --targets"
            )
        scaling = scaling or Standardization.of(series.values[:train], series.columns)
        values, marks = scaling.apply(series.values), calendar(series.dates, series.step_s)
        bounds = ((0, train), (train - past, validation), (validation - past, test))
        parts = [SlidingWindows(values[low:high], marks[low:high], past, horizon, targets) for low, high in bounds]
        return cls(parts[0], parts[1], parts[2], scaling, validation - past)


def series_of(
    table: Table, date: str, places: Sequence[int], *, fill: bool = False, frequency: str | None = None
) -> TimeSeries:
    """Return the columns at ``places`` of ``table`` as a series over its column ``date``.

    Args:
        table: what was read.
        date: the column of dates, by name or position.
        places: of the columns of values, from 0.
        fill: whether missing values and missing dates are interpolated.
        frequency: the step to be expected where the dates leave a choice, in pandas' words.

    Raises:
        ConfigError: there is no column ``date``.
        DataError: dates that are none, do not rise, or are not regular; values that are missing or no numbers.

    """
    dates = _dates(table, table.find_one(date))
    values = table.numbers(places, fill=fill, at=dates.asi8)
    dates, values = _regular(table, dates, values, fill, frequency)
    return TimeSeries(table.path.stem, dates, values, tuple(table.columns[place] for place in places))


def calendar(dates: Any, step_s: float) -> Tensor:
    """Return float32 ``(steps, features)`` from -0.5 to 0.5: places in the hour, day, week, month and year.

    Minute, hour and day of the week are there where steps are shorter than an hour, a day, a week. The paper's code has the
    same ones for steps of a minute up to a day.
    """
    features = [
        (step_s < HOUR_S, dates.minute / 59),
        (step_s < DAY_S, dates.hour / 23),
        (step_s < 7 * DAY_S, dates.day_of_week / 6),
        (True, (dates.day - 1) / 30),
        (True, (dates.day_of_year - 1) / 365),
    ]
    return torch.from_numpy(np.stack([np.asarray(value) - 0.5 for used, value in features if used], axis=1)).float()


def _dates(table: Table, place: int) -> Any:
    """Return the column of dates, all of them dates and rising."""
    pandas = import_optional("pandas", extra="forecast")
    cells = [row[place].strip() for row in table.rows]
    where = f"column {place + 1} ({table.columns[place]})"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ways of writing dates that pandas is going to give up
            read = pandas.to_datetime(
                pandas.Series(_year_first(cells, f"{table.path}, {where}")), format="mixed", errors="coerce"
            )
            dates = pandas.DatetimeIndex(read)
    except (ValueError, TypeError) as error:
        raise DataError(f"{table.path}, {where}: dates of several time zones: write all in one, such as UTC") from error
    wrong = np.flatnonzero(dates.isna())
    if len(wrong):
        cells_named = [f"{cells[row]!r} in line {table.lines[row]}" for row in wrong.tolist()]
        raise DataError(
            f"{table.path}, {where}: no date: {listed(cells_named)}; write dates as 2016-07-01 00:00:00, or name another "
            "column with --date"
        )
    late = np.flatnonzero(np.diff(dates.asi8) <= 0)
    if len(late):
        row = int(late[0]) + 1
        again = "the same date as" if dates[row] == dates[row - 1] else "an earlier date than"
        raise DataError(
            f"{table.path}, line {table.lines[row]}, {where}: {cells[row]} is {again} {cells[row - 1]} in line "
            f"{table.lines[row - 1]}: sort the rows by date, and keep one of each"
        )
    return dates


def _year_first(cells: Sequence[str], where: str) -> list[str]:
    """Return dates with the year first; times without a date become empty.

    What is the day and what the month is told by all of them together: one number above 12, or points between them.
    """
    cells = ["" if re.match(r"\d{1,2}:", cell) else cell.translate(CHINESE).strip() for cell in cells]
    found = [DAY_AND_MONTH.fullmatch(cell) for cell in cells]
    told = [match for match in found if match]
    if not told:
        return cells
    day_first = told[0][2] == "." or max(int(match[1]) for match in told) > 12
    if len(told[0][4]) == 2 or not (day_first or max(int(match[3]) for match in told) > 12):
        raise DataError(
            f"{where}: {told[0][0]!r} may be read in several ways, and no row tells which: write dates as 2016-07-01 00:00:00"
        )
    day, month = (1, 3) if day_first else (3, 1)
    return [
        f"{match[4]}-{match[month]:0>2}-{match[day]:0>2}{match[5]}" if match else cell
        for cell, match in zip(cells, found, strict=True)
    ]


def _regular(table: Table, dates: Any, values: Tensor, fill: bool, frequency: str | None) -> tuple[Any, Tensor]:
    """Return dates with a frequency and their values; gaps are filled where that is allowed."""
    if len(dates) < 3:
        raise DataError(
            f"{table.path} has too few rows, {len(dates)}: a series needs three at least, and many more to learn from"
        )
    regular = _grid(dates, frequency)
    if regular is None:
        raise DataError(f"{table.path}, {_irregular(table, dates)}")
    missing = len(regular) - len(dates)
    if not missing:
        return regular, values
    if not fill:
        row = int(np.flatnonzero(regular[: len(dates)] != dates)[0])
        raise DataError(
            f"{table.path}, line {table.lines[row]}: {dates[row]} follows {dates[row - 1]} in line {table.lines[row - 1]}, and "
            f"{regular[row]} is missing between them ({missing:,} missing in all): add the missing rows, or give --fill true, "
            "which interpolates them"
        )
    logger.info("%s: interpolated missing rows: %s", table.path, f"{missing:,}")
    columns = [np.interp(regular.asi8, dates.asi8, column.numpy()) for column in values.unbind(1)]
    return regular, torch.from_numpy(np.stack(columns, axis=1))


def _grid(dates: Any, frequency: str | None) -> Any:
    """Return the fewest regular dates that have all of ``dates`` among them; ``None`` if that more than doubles them."""
    pandas = import_optional("pandas", extra="forecast")
    usual, day = _usual(dates), pandas.Timedelta(days=1)
    found = None
    for step in (frequency, usual, *(UNEQUAL if usual >= day else ())):
        if step is None or (step is usual and (dates[-1] - dates[0]) / usual > 2 * len(dates)):
            continue
        regular = pandas.date_range(dates[0], dates[-1], freq=step)
        fewer = len(regular) <= 2 * len(dates) if found is None else len(regular) < len(found)
        if fewer and bool(dates.isin(regular).all()):
            found = regular
    return None if found is None else found.as_unit(dates.unit)


def _irregular(table: Table, dates: Any) -> str:
    """Say which date makes a series irregular: one between two steps, or one after a gap that is too long to fill."""
    usual = _usual(dates)
    steps = dates[1:] - dates[:-1]
    between = np.flatnonzero(steps % usual != usual * 0)
    row = int(between[0] if len(between) else np.argmax(steps)) + 1
    what = f"line {table.lines[row]}: {dates[row]} comes {steps[row - 1]} after line {table.lines[row - 1]}"
    if len(between):
        return (
            f"{what}, no whole number of the usual steps of {usual}: correct the dates; only missing rows can be filled"
        )
    return f"{what}, and the usual step is {usual}: more rows are missing than there are; correct the dates, or leave rows out"


def _usual(dates: Any) -> Any:
    """Return the commonest step."""
    steps = dates[1:] - dates[:-1]
    values, counts = np.unique(steps.asi8, return_counts=True)
    return steps[int(np.flatnonzero(steps.asi8 == values[counts.argmax()])[0])]


def _borders(series: TimeSeries, split: str) -> tuple[int, int, int]:
    """Return where training, validation and test end."""
    rows = len(series)
    kind = series.name[:4].lower()
    if split == "paper" or (split == "auto" and kind in ("etth", "ettm")):
        steps_per_hour = round(HOUR_S / series.step_s) if series.step_s <= HOUR_S else 0
        ends = ett.borders(rows, steps_per_hour) if steps_per_hour else None
        if ends is not None:
            return ends
        if split == "paper":
            raise ConfigError(
                f"split is 'paper', which takes 20 months of 30 days in steps of an hour or less; {series.name} has {rows:,} "
                f"steps of {series.frequency}: use --split ratio"
            )
    train, test = int(rows * 0.7), int(rows * 0.2)
    return train, rows - test, rows


def _check_lengths(series: TimeSeries, lengths: dict[str, int], past: int, horizon: int) -> None:
    """Make sure that each part has a window: validation and test may reach back for their past."""
    need = {"training": past + horizon, "validation": horizon, "test": horizon}
    for part, length in lengths.items():
        if length < need[part]:
            raise DataError(
                f"{series.name} has {len(series):,} rows, {length:,} of them for {part}, which needs {need[part]:,} at least "
                f"(seq_len {past}, pred_len {horizon}): use more rows, or a smaller --seq_len or --pred_len"
            )
