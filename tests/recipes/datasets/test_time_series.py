"""Time series: regular dates, the paper's split, windows as views, calendar features."""

import hashlib
from pathlib import Path

import pandas as pd
import pytest
import torch

from duoka.errors import ConfigError, DataError
from duoka.recipes.datasets import csv_table, time_series
from duoka.recipes.datasets.time_series import (
    SeriesSplit,
    SlidingWindows,
    TimeSeries,
    calendar_features,
    loader,
    series_from_table,
)
from support.paths import ETTH1, needs_file


@pytest.fixture
def file(tmp_path):
    def write(dates, values=None, name="s.csv") -> Path:
        values = range(len(dates)) if values is None else values
        lines = [f"{date},{value}" for date, value in zip(dates, values, strict=True)]
        (tmp_path / name).write_text("\n".join(["date,x", *lines]) + "\n")
        return tmp_path / name

    return write


def read(path: Path, *, fill: bool = False) -> TimeSeries:
    return series_from_table(csv_table.read(path), "date", [1], fill=fill)


def hours(count: int, step: str = "h") -> list[str]:
    return [str(date) for date in pd.date_range("2020-01-01", periods=count, freq=step)]


@pytest.mark.parametrize(
    ("step", "season"),
    [("15min", 96), ("h", 24), ("24h", 7), ("168h", 52), ("3MS", 4), ("ME", 12), ("B", 5), ("MS", 12)],
)
def test_steps_from_minutes_to_months_are_regular(file, step, season):
    dates = hours(40, step)
    series = read(file(dates))
    assert (series.frequency, series.season_length()) == (step, season)
    expected = pd.date_range(dates[0], periods=43, freq=step)[40:]
    assert list(series.future_dates(3)) == list(expected)


def test_step_of_seven_minutes_is_regular(file):
    assert read(file(hours(10, "7min"))).frequency == "7min"


@pytest.mark.parametrize(
    ("dates", "message"),
    [
        (["2020-01-01", "soon", "2020-01-03", ""], r"column 1 \(date\): no date: 'soon' in line 3; '' in line 5"),
        (
            ["2020-01-01", "2020-01-03", "2020-01-02"],
            "line 4, .*2020-01-02 is an earlier date than 2020-01-03 in line 3",
        ),
        (["2020-01-01", "2020-01-02", "2020-01-02"], "line 4, .*2020-01-02 is the same date as 2020-01-02 in line 3"),
        (
            [*hours(9), "2020-01-01 10:00"],
            r"line 11: .* 10:00:00 follows 2020-01-01 08:00:00 in line 10, and 2020-01-01 09:00:00 is missing .*\(1 missing in",
        ),
        (hours(2), "has too few rows, 2"),
        (["08:00", "09:00", "10:00"], "no date: '08:00' in line 2"),
        (["12/13/2020", "13/12/2020", "14/12/2020"], "no date: '12/13/2020' in line 2"),
        (["01/02/2020", "01/03/2020", "01/04/2020"], "'01/02/2020' may be read in several ways"),
        (["13/01/20", "14/01/20", "15/01/20"], "'13/01/20' may be read in several ways"),
        (["2020-03-29 01:00+01:00", "2020-03-29 03:00+02:00", "2020-03-29 04:00+02:00"], "several time zones: .* UTC"),
        (
            [*hours(9), "2020-01-01 09:20"],
            r"line 11: .* comes 0 days 01:20:00 after line 10, no whole number.*correct the",
        ),
        ([*hours(9), "2120-01-01 00:00"], "line 11: .*more rows are missing than there are"),
        (
            [*hours(9, "B"), "2020-01-15"],
            "line 11: 2020-01-15 00:00:00 follows .*, and 2020-01-14 00:00:00 is missing between them",
        ),
    ],
)
def test_dates_without_a_series_are_an_error_with_their_line(file, dates, message):
    with pytest.raises(DataError, match=message):
        read(file(dates))


def test_missing_dates_are_filled_on_request(file):
    dates = hours(12)
    series = read(file(dates[:3] + dates[5:], [0, 1, 2, *range(5, 12)]), fill=True)
    assert series.values.flatten().tolist() == pytest.approx(range(12))
    with pytest.raises(DataError, match="no whole number of the usual steps"):
        read(file([*dates, "2020-01-01 11:30"]), fill=True)


@pytest.mark.parametrize("step", ["MS", "B"])
def test_missing_dates_of_unequal_steps_are_filled_too(file, step):
    dates = hours(30, step)
    series = read(file(dates[:9] + dates[10:]), fill=True)
    assert (series.frequency, len(series)) == (step, 30)


def test_missing_values_are_interpolated_over_time(file):
    dates = hours(10)
    series = read(file([*dates[:2], *dates[5:]], [0, "", *range(5, 10)]), fill=True)
    assert series.values.flatten().tolist() == pytest.approx(range(10))


@pytest.mark.parametrize("form", ["%d/%m/%Y", "%m/%d/%Y", "%d.%m.%Y", "%Y/%m/%d", "%d-%m-%Y", "%Y年%m月%d日"])
def test_all_dates_together_distinguish_day_and_month(file, form):
    dates = pd.date_range("2020-01-01", periods=40, freq="h" if form == "%d.%m.%Y" else "24h")
    series = read(file([date.strftime(f"{form} %H:%M") for date in dates]))
    assert list(series.dates) == list(dates)


def test_expected_frequency_is_preferred(file):
    path = file(["2020-07-01", "2020-08-01", "2020-09-01"])
    assert read(path).frequency == "744h"
    assert series_from_table(csv_table.read(path), "1", [1], frequency="MS").frequency == "MS"


def test_constant_series_is_an_error():
    series = TimeSeries(
        "flat", pd.date_range("2020-01-01", periods=200, freq="h"), torch.ones(200, 2).double(), ("x", "y")
    )
    series.values[:, 1] = torch.arange(200)
    with pytest.raises(DataError, match="flat: x never changes in the 140 training rows"):
        SeriesSplit.from_series(series, "auto", 10, 5, [0])
    assert SeriesSplit.from_series(series, "auto", 10, 5, [0, 1]).standardization.std[0] == 1


def test_missing_column_of_dates_is_named(file):
    with pytest.raises(ConfigError, match="no column 'day'"):
        series_from_table(csv_table.read(file(hours(5))), "day", [1])


def test_calendar_features_lie_between_minus_and_plus_a_half():
    dates = pd.date_range("2020-01-01", "2020-12-31 23:45", freq="15min")
    for step, features in ((900, 5), (3600, 4), (86_400, 3), (7 * 86_400, 2)):
        marks = calendar_features(dates, step)
        assert marks.shape == (len(dates), features)
        assert marks.min() == -0.5
        assert marks.max() <= 0.5
    assert calendar_features(dates, 3600)[0].tolist() == pytest.approx([-0.5, 2 / 6 - 0.5, -0.5, -0.5])


def windows() -> SlidingWindows:
    values = torch.arange(60.0).view(20, 3)
    return SlidingWindows(values, torch.arange(20.0).view(20, 1), past=5, horizon=2, targets=[2, 0])


def test_windows_are_views_of_the_series():
    samples = windows()
    for view, whole in zip(samples.views, (samples.values, samples.marks), strict=True):
        assert view.data_ptr() == whole.data_ptr()
        assert view.untyped_storage().nbytes() == whole.untyped_storage().nbytes()
        assert view.shape[:2] == (14, 7)


def test_window_starts_at_its_index():
    samples = windows()
    assert len(samples) == 14
    for place in (0, 7, 13):
        history, marks, future = samples[place]
        assert torch.equal(history, samples.values[place : place + 5])
        assert torch.equal(marks, samples.marks[place : place + 7])
        assert torch.equal(future, samples.values[place + 5 : place + 7][:, [2, 0]])
        assert torch.equal(future, samples.futures[place])


def test_batch_is_its_windows_and_owns_its_memory():
    samples = windows()
    (batch,) = loader(samples, 14)
    for column, stacked in enumerate(batch):
        assert torch.equal(stacked, torch.stack([samples[place][column] for place in range(14)]))
    batch[0].zero_()
    assert samples.values[1:].min() > 0


def made(name: str, rows: int, step: str = "h") -> TimeSeries:
    dates = pd.date_range("2020-01-01", periods=rows, freq=step)
    return TimeSeries(name, dates, torch.arange(float(rows), dtype=torch.float64).unsqueeze(1), ("x",))


def test_paper_split_has_12_4_and_4_months():
    for name, step, factor in (("ETTh9", "h", 1), ("ETTm9", "15min", 4)):
        parts = SeriesSplit.from_series(made(name, 17_420 * factor, step), "auto", 48, 24, [0])
        lengths = [len(part) for part in (parts.train, parts.validation, parts.test)]
        assert lengths == [8640 * factor - 71, 2880 * factor - 23, 2880 * factor - 23]
        first = parts.standardization.inverse_transform(parts.test.futures[0])[0]
        assert first.item() == pytest.approx(11_520 * factor, rel=1e-6)
        assert parts.standardization.mean == ((8640 * factor - 1) / 2,)


def test_other_series_are_split_70_10_20():
    parts = SeriesSplit.from_series(made("sales", 1000), "auto", 30, 10, [0])
    assert [len(part) for part in (parts.train, parts.validation, parts.test)] == [661, 91, 191]
    with pytest.raises(ConfigError, match=r"takes 20 months.*sales has 1,000 steps of h: use --split ratio"):
        SeriesSplit.from_series(made("sales", 1000), "paper", 30, 10, [0])


def test_too_few_rows_are_counted():
    with pytest.raises(DataError, match="sales has 100 rows, 70 of them for training, which needs 72 at least"):
        SeriesSplit.from_series(made("sales", 100), "auto", 48, 24, [0])
    with pytest.raises(DataError, match="sales has 120 rows, 12 of them for validation, which needs 24"):
        SeriesSplit.from_series(made("sales", 120), "auto", 48, 24, [0])


@needs_file(ETTH1)
def test_real_file_has_the_paper_split():
    time_series.locate_ett("ETTh1", ETTH1.parent, download=False)
    contents = csv_table.read(ETTH1)
    assert contents.columns == ("date", "HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT")
    series = series_from_table(contents, "date", range(1, 8))
    assert (len(series), series.frequency, series.season_length()) == (17_420, "h", 24)
    parts = SeriesSplit.from_series(series, "auto", 48, 24, range(7))
    assert [len(part) for part in (parts.train, parts.validation, parts.test)] == [8569, 2857, 2857]
    frame = pd.read_csv(ETTH1)
    first_test = torch.from_numpy(frame.iloc[11_520 : 11_520 + 24, 1:].to_numpy())
    assert torch.allclose(parts.standardization.inverse_transform(parts.test.futures[0]), first_test, atol=1e-4)
    train = frame.iloc[:8640, 1:]
    assert parts.standardization.mean == pytest.approx(tuple(train.mean()))
    assert parts.standardization.std == pytest.approx(tuple(train.std(ddof=0)))


def test_missing_or_changed_set_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"ETTh2\.csv is not there, and download is off"):
        time_series.locate_ett("ETTh2", tmp_path, download=False)
    (tmp_path / "ETTh2.csv").write_text("date,x\n")
    with pytest.raises(DataError, match="has 7 bytes, not 2,417,960: delete it"):
        time_series.locate_ett("ETTh2", tmp_path, download=False)


def test_set_is_downloaded_once_and_verified(tmp_path, monkeypatch):
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / "ETTh2.csv").write_bytes(b"date,OT\n2016-07-01,1\n")
    monkeypatch.setattr(time_series, "ETT_URL", (tmp_path / "server").as_uri() + "/")
    with pytest.raises(DataError, match="has 21 bytes, not 2,417,960: the download of"):
        time_series.locate_ett("ETTh2", tmp_path / "data")
    monkeypatch.setitem(time_series.ETT_FILES, "ETTh2", (21, "0" * 32))
    with pytest.raises(DataError, match="has the SHA-256 checksum"):
        time_series.locate_ett("ETTh2", tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []
    digest = hashlib.sha256(b"date,OT\n2016-07-01,1\n").hexdigest()
    monkeypatch.setitem(time_series.ETT_FILES, "ETTh2", (21, digest))
    path = time_series.locate_ett("ETTh2", tmp_path / "data")
    monkeypatch.setattr(time_series, "ETT_URL", "file:///nowhere/")
    assert time_series.locate_ett("ETTh2", tmp_path / "data") == path


def test_dates_of_ten_thousand_years_make_none_of_those_between(file, monkeypatch):
    made = []
    original = pd.date_range
    monkeypatch.setattr(pd, "date_range", lambda *args, **options: made.append(original(*args, **options)) or made[-1])
    assert len(read(file(["0001-01-01", "5000-01-01", "9999-01-01"]))) == 3
    assert sum(map(len, made)) < 100
