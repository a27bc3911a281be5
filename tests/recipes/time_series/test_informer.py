"""The recipe ``informer`` end to end on small tables: results, files, errors, resume, and several devices."""

import json
import math
import shlex
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch.nn.functional import mse_loss

from duoka import Trainer
from duoka.cli.main import main
from duoka.errors import ConfigError, DataError
from duoka.recipes.datasets import csv_table, synthetic_table
from duoka.recipes.datasets.time_series import SlidingWindows, TimeSeries, loader
from duoka.recipes.models.informer import Informer, InformerSize
from duoka.recipes.time_series import TimeSeriesConfig, forecasting, plots, regression, run_steps
from duoka.recipes.time_series.baselines import last_season, last_value
from duoka.recipes.time_series.config import LENGTHS
from duoka.recipes.time_series.run_steps import trainer_options
from support.paths import ETTH1, needs_file

SMALL = ["--device", "cpu", "--width", "16", "--heads", "2", "--hidden", "32", "--seq_len", "24", "--label_len", "12"]
SMALL = [*SMALL, "--pred_len", "6", "--lr", "0.003", "--epochs", "2", "--batch_size", "64"]
TINY = ["--device", "cpu", "--width", "16", "--heads", "2", "--hidden", "16", "--epochs", "3", "--batch_size", "128"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are fastest on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def waves(rows: int = 600) -> pd.DataFrame:
    """Three series of a day's rhythm, hourly."""
    hour = torch.arange(rows, dtype=torch.float64)
    noise = 0.1 * torch.randn(rows, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    day = 2 * math.pi * hour / 24
    values = torch.stack((day.sin(), 5 + 2 * day.cos(), (2 * day).sin() - 3), dim=1) + noise
    frame = pd.DataFrame(values.numpy(), columns=["a", "b", "OT"])
    frame.insert(0, "date", pd.date_range("2021-03-01", periods=rows, freq="h").astype(str))
    return frame


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a series and a table."""
    folder = tmp_path_factory.mktemp("informer")
    waves().to_csv(folder / "waves.csv", index=False)
    synthetic_table.write(folder / "datatry.csv", synthetic_table.make(400))
    return folder


def trained(folder: Path, out: str, *options: str) -> Path:
    assert main(["train", "informer", *options, "--out", str(folder / out)]) == 0
    (run,) = (folder / out / "informer").iterdir()
    return run


@pytest.fixture(scope="module")
def run(folder) -> Path:
    """A finished run of a forecast."""
    return trained(folder, "forecast", "--csv", str(folder / "waves.csv"), *SMALL)


@pytest.fixture(scope="module")
def table_run(folder) -> Path:
    """A finished run of a regression."""
    return trained(folder, "regress", "--task", "regress", "--csv", str(folder / "datatry.csv"), *TINY)


def files(run: Path) -> set[str]:
    return {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}


def results(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


COMMON = {"config.yml", "metrics.jsonl", "log.txt", "model.safetensors", "results.json", "evaluation_results.txt"}


def test_forecast_writes_all_files(run):
    pictures = {f"plots/{name}.png" for name in ("curves", "forecasts", "error_by_step", "error_by_column")}
    assert COMMON | pictures | {"forecasts.csv"} <= files(run)
    for path in run.rglob("*.png"):
        with Image.open(path) as picture:
            assert min(picture.size) > 300


def test_regression_writes_all_files(table_run):
    pictures = {f"plots/{kind}_{name}.png" for kind in ("lines", "scatter") for name in ("Pressure", "SWAT")}
    assert COMMON | pictures | {"predictions.csv", "plots/curves.png", "plots/residuals.png"} <= files(table_run)


def test_errors_are_those_of_the_written_forecasts(run):
    found = results(run)
    data = forecasting.load(
        TimeSeriesConfig(csv=str(run.parents[1].parent / "waves.csv"), seq_len=24, pred_len=6).resolved()
    )
    written = csv_table.read(run / "forecasts.csv")
    values = written.numbers(range(1, 7))
    truth, forecast = values[:, 0::2], values[:, 1::2]
    expected = data.split.standardization.inverse_transform(data.split.test.futures[::6]).flatten(0, 1)
    assert torch.allclose(truth, expected, rtol=1e-5, atol=1e-5)
    assert [written.text(0)[0], written.text(0)[6]] == [str(data.series.dates[480]), str(data.series.dates[486])]
    units = found["original_units"]["Informer"]
    assert float((forecast - truth).square().mean()) == pytest.approx(units["mse"], rel=0.2)  # every sixth window only
    steps, columns = units["mse_by_step"], [column["mse"] for column in units["by_column"].values()]
    assert sum(steps) / 6 == pytest.approx(units["mse"])
    assert sum(columns) / 3 == pytest.approx(units["mse"])


def test_standardized_and_original_errors_differ_by_the_deviations(run):
    found = results(run)
    for column, deviation in zip(found["series"]["columns"], found["series"]["std"], strict=True):
        scaled, units = (found[kind]["Informer"]["by_column"][column] for kind in ("standardised", "original_units"))
        assert units["mse"] == pytest.approx(scaled["mse"] * deviation**2)
        assert units["mae"] == pytest.approx(scaled["mae"] * deviation)
    assert found["test_mse"] == found["standardised"]["Informer"]["mse"]


def test_baselines_repeat_the_last_value_and_season():
    values = torch.arange(80.0).view(40, 2)
    windows = SlidingWindows(values, torch.zeros(40, 1), past=8, horizon=5, targets=[1])
    assert torch.equal(last_value(windows)[3], values[10, 1].expand(5, 1))
    assert torch.equal(last_season(windows, 3)[0].flatten(), values[[5, 6, 7, 5, 6], 1])
    assert last_season(windows, 9) is None


def test_report_names_the_best_model(run):
    text, found = (run / "evaluation_results.txt").read_text(), results(run)["standardised"]
    assert set(found) == {"Informer", "last value", "last season", "DLinear"}
    best = min(found, key=lambda name: found[name]["mse"])
    assert f"Smallest MSE: {best}" in text
    for column in ("a", "b", "OT"):
        assert f"\n{column} " in text


def test_config_repeats_the_run_bit_identically(run, folder):
    again = trained(folder, "again", "-c", str(run / "config.yml"))
    first, second = load_file(run / "model.safetensors"), load_file(again / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert results(run) == results(again)
    options = yaml.safe_load((run / "config.yml").read_text(encoding="utf-8"))
    assert {key for key, value in options.items() if value is None} == {"inputs", "targets", "train_rows", "resume"}


@pytest.mark.parametrize("kind", ["forecast", "regress"])
def test_eval_gives_the_numbers_of_training(run, table_run, kind, capsys):
    folder = {"forecast": run, "regress": table_run}[kind]
    assert main(["eval", str(folder)]) == 0
    found, again = results(folder), json.loads((folder / "evaluation.json").read_text())
    if kind == "forecast":
        assert again == {name: found[name] for name in ("test_mse", "test_mae")}
    else:
        assert again == {name: found[name] for name in ("overall", "targets")}
    assert "test m" in capsys.readouterr().out


@pytest.mark.parametrize("task", ["forecast", "regress"])
def test_two_devices_take_the_steps_of_one(folder, monkeypatch, task):
    """Adam would turn rounding in gradients near 0 into steps of full size, so the optimizer is SGD."""
    csv, small = {"forecast": ("waves.csv", SMALL), "regress": ("datatry.csv", TINY)}[task]
    monkeypatch.setattr(run_steps, "trainer_options", lambda config: {**trainer_options(config), "optimizer": "sgd"})
    options = ["--task", task, "--csv", str(folder / csv), *small, "--lr", "0.1", "--epochs", "1", "--batch_size", "50"]
    options = [*options, "--dropout", "0", "--baselines", "false"]
    one = trained(folder, f"one-{task}", *options)
    two = trained(folder, f"two-{task}", *options, "--device", "cpu:2")
    first, second = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    for name in first:
        torch.testing.assert_close(second[name], first[name], rtol=1e-4, atol=1e-5)
    found = [results(run).get("test_mse") or results(run)["overall"]["rmse"] for run in (one, two)]
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_forecast_does_not_depend_on_the_future(folder):
    config = TimeSeriesConfig(csv=str(folder / "waves.csv"), seq_len=24, label_len=12, pred_len=6).resolved()
    test = forecasting.load(config).split.test
    model = Informer(3, 3, test.marks.shape[1], label_length=12, horizon=6, size=InformerSize(16, 2, 32, factor=1))
    trainer = Trainer(model, loss=mse_loss, device="cpu", verbose=False)
    before, truth = trainer.predict(loader(test, 64))[0], test.futures[0].clone()
    test.values[test.past :] += 1e6  # all that comes after the first window's past
    assert torch.equal(trainer.predict(loader(test, 64))[0], before)
    assert not torch.equal(test.futures[0], truth)


@pytest.mark.parametrize(
    ("features", "options", "inputs", "outputs"),
    [
        ("M", [], ["a", "b", "OT"], ["a", "b", "OT"]),
        ("S", [], ["OT"], ["OT"]),
        ("MS", [], ["a", "b", "OT"], ["OT"]),
        ("S", ["--targets", "b"], ["b"], ["b"]),
        ("MS", ["--inputs", "a", "--targets", "3"], ["a", "b"], ["b"]),
    ],
)
def test_one_or_many_series_are_forecast_from_one_or_many(folder, tmp_path, features, options, inputs, outputs):
    words = ["--csv", str(folder / "waves.csv"), *SMALL, "--features", features, *options, "--epochs", "1"]
    run = trained(tmp_path, "runs", *words, "--attention", "full", "--inverse", "true")
    found = results(run)
    assert (found["series"]["columns"], found["series"]["targets"]) == (inputs, outputs)
    assert found["test_mae"] == found["original_units"]["Informer"]["mae"]
    assert main(["predict", str(run), "--from", str(folder / "waves.csv")]) == 0
    assert csv_table.read(run / "predictions" / "waves.csv").columns == ("date", *outputs)


def test_predict_forecasts_beyond_the_end_of_a_file(run, folder, capsys):
    capsys.readouterr()
    assert main(["predict", str(run), "--from", str(folder / "waves.csv"), "--device", "cpu", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    csv, picture = map(Path, answer["files"])
    found = csv_table.read(csv)
    assert found.text(0) == [f"2021-03-26 {hour:02}:00:00" for hour in range(6)]
    assert found.numbers([1, 2, 3]).isfinite().all()
    with Image.open(picture) as shown:
        assert min(shown.size) > 300


def test_forecast_of_the_last_test_window_is_that_of_training(run, folder, tmp_path):
    frame = waves()
    frame[:-6].to_csv(tmp_path / "shorter.csv", index=False)
    assert main(["predict", str(run), "--from", str(tmp_path / "shorter.csv"), "--device", "cpu"]) == 0
    found = csv_table.read(run / "predictions" / "shorter.csv").numbers([1, 2, 3])
    written = csv_table.read(run / "forecasts.csv")
    place = written.text(0).index(frame["date"].iloc[-6])
    torch.testing.assert_close(found, written.numbers([2, 4, 6])[place : place + 6], rtol=1e-4, atol=1e-4)


def test_regression_predicts_the_rows_of_another_file(table_run, folder, tmp_path, capsys):
    capsys.readouterr()
    only = pd.read_csv(folder / "datatry.csv").drop(columns=["Pressure", "SWAT"])[::-1]
    only.to_csv(tmp_path / "new.csv", index=False)
    assert main(["predict", str(table_run), "--from", str(tmp_path / "new.csv"), "--device", "cpu"]) == 0
    assert "400 rows" in capsys.readouterr().out
    new = csv_table.read(table_run / "predictions" / "new.csv")
    trained_on = csv_table.read(table_run / "predictions.csv")
    line = int(trained_on.text(0)[0])
    row = new.numbers([1, 2])[400 - (line - 1)]
    torch.testing.assert_close(row, trained_on.numbers([2, 4])[0], rtol=1e-4, atol=1e-4)
    assert main(["predict", str(table_run), "--from", str(folder / "datatry.csv"), "--device", "cpu"]) == 0
    assert (table_run / "predictions" / "datatry-Pressure.png").is_file()


def test_regression_metrics_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    truth, predicted = torch.randn(50, 2).double() + 3, torch.randn(50, 2).double() + 3
    found = regression.regression_metrics(truth, predicted, ("a", "b"))
    for place, name in enumerate("ab"):
        true, estimate = truth[:, place].numpy(), predicted[:, place].numpy()
        assert found["targets"][name]["r2"] == pytest.approx(metrics.r2_score(true, estimate))
        assert found["targets"][name]["rmse"] == pytest.approx(metrics.root_mean_squared_error(true, estimate))
        assert found["targets"][name]["mae"] == pytest.approx(metrics.mean_absolute_error(true, estimate))
        assert found["targets"][name]["l2"] == pytest.approx(
            ((true - estimate) ** 2).sum() ** 0.5 / (true**2).sum() ** 0.5
        )
    assert found["overall"]["r2"] == pytest.approx(metrics.r2_score(truth.numpy(), predicted.numpy()))


def test_training_rows_are_drawn_by_seed_and_standardize_all_rows(folder):
    options = {"task": "regress", "csv": str(folder / "datatry.csv")}
    rows = regression.load(TimeSeriesConfig(**options).resolved())
    assert (len(rows.train), len(rows.test)) == (320, 80)
    assert rows.train.tensors[0].mean(0).abs().max() < 1e-6
    assert rows.train.tensors[1].std(0, correction=0).tolist() == pytest.approx([1, 1], abs=1e-5)
    again, other = (regression.load(TimeSeriesConfig(**options, split_seed=seed).resolved()) for seed in (0, 1))
    assert again.test_lines == rows.test_lines != other.test_lines
    assert len(regression.load(TimeSeriesConfig(**options, train_rows=100).resolved()).train) == 100


def test_default_lengths_are_the_papers():
    for features, lengths in LENGTHS.items():
        assert TimeSeriesConfig(features=features).resolved().lengths == lengths
    assert TimeSeriesConfig(seq_len=30).resolved().lengths == (30, 30, 24)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "regress"}, "duoka data make datatry"),
        ({"seq_len": 24, "label_len": 25}, "label_len=25 is longer than seq_len=24"),
        ({"width": 30, "heads": 4}, "width=30 does not suit heads=4"),
        ({"pred_len": 0}, "pred_len=0 is not valid"),
        ({"dropout": 1.0}, "dropout=1.0 is not valid"),
        ({"csv": ""}, "csv is empty: name a file"),
        ({"seed": 2**63}, "seed=9223372036854775808 is not valid"),
        ({"split_seed": 2**70}, "split_seed=1180591620717411303424 is not valid"),
    ],
)
def test_options_that_do_not_fit_together_are_an_error(options, message):
    with pytest.raises(ConfigError, match=message):
        TimeSeriesConfig(**options).resolved()


def changed(folder: Path, where: Path, change) -> str:
    frame = waves()
    lines = [",".join(map(str, row)) for row in [frame.columns, *frame.itertuples(index=False)]]
    (where / "bad.csv").write_text("\n".join(change(lines)) + "\n")
    return str(where / "bad.csv")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda lines: [*lines[:99], lines[99].rpartition(",")[0] + ",x", *lines[100:]],
            "'x' in line 100, column 4 (OT)",
        ),
        (lambda lines: [*lines[:99], lines[99].rpartition(",")[0] + ",", *lines[100:]], "line 100, column 4 (OT)"),
        (lambda lines: [*lines[:99], lines[100], lines[99], *lines[101:]], "line 101, column 1 (date)"),
        (
            lambda lines: [*lines[:99], *lines[101:]],
            "line 100: 2021-03-05 04:00:00 follows 2021-03-05 01:00:00 in line 99, and 2021-03-05 02:00:00 is missing",
        ),
        (lambda lines: [*lines[:99], lines[99] + ",5", *lines[100:]], "line 100: 5 columns where the first line has 4"),
        (lambda lines: lines[:60], "bad has 59 rows, 41 of them for training"[:20]),
        (lambda lines: [line.replace("date", "day") for line in lines], "no column 'date'"),
    ],
)
def test_faulty_series_is_one_message_with_line_and_column(folder, tmp_path, capfd, change, message):
    words = ["train", "informer", "--csv", changed(folder, tmp_path, change), *SMALL, "--pred_len", "20"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    shown = capfd.readouterr()
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": "1-4"}, r"column 1 \(date\) of .* has the dates: leave it out of --inputs"),
        ({"targets": "date"}, "leave it out of --targets"),
        (
            {"features": "S", "inputs": "a,b", "targets": "OT"},
            "`inputs` is 'a,b': leave --inputs out, or use --features MS",
        ),
        ({"task": "regress", "inputs": "2-4", "targets": "4"}, "both among inputs and targets: OT: leave each out"),
    ],
)
def test_columns_that_do_not_fit_together_are_an_error(folder, options, message):
    config = TimeSeriesConfig(csv=str(folder / "waves.csv"), **options).resolved()
    with pytest.raises(ConfigError, match=message):
        {"forecast": forecasting, "regress": regression}[config.task].load(config)


def test_fill_interpolates_and_a_constant_column_is_allowed(folder, tmp_path):
    def change(lines: list[str]) -> list[str]:
        lines = [lines[0], *(line.replace(line.split(",")[1], "7", 1) for line in lines[1:])]
        return [*lines[:99], lines[99].rpartition(",")[0] + ",", *lines[102:]]

    options = ["--csv", changed(folder, tmp_path, change), *SMALL, "--fill", "--epochs", "1", "--date", "1"]
    found = results(trained(tmp_path, "out", *options))
    assert math.isfinite(found["test_mse"])
    assert found["series"]["std"][0] == 1


def test_constant_target_is_an_error(folder, tmp_path, capfd):
    frame = pd.read_csv(folder / "datatry.csv")
    frame["SWAT"] = 0.5
    frame.to_csv(tmp_path / "flat.csv", index=False)
    assert main(["train", "informer", "--task", "regress", "--csv", str(tmp_path / "flat.csv"), *TINY]) == 2
    assert "column 12 (SWAT): 0.5 in every training row" in capfd.readouterr().err


def test_target_that_is_constant_in_the_test_is_an_error(folder, tmp_path):
    config = TimeSeriesConfig(task="regress", csv=str(folder / "datatry.csv")).resolved()
    test = [line - 2 for line in regression.load(config).test_lines]
    frame = pd.read_csv(folder / "datatry.csv")
    frame.loc[test, "SWAT"] = 0.5
    frame.to_csv(tmp_path / "flat.csv", index=False)
    with pytest.raises(DataError, match=r"column 12 \(SWAT\): 0.5 in every test row"):
        regression.load(TimeSeriesConfig(task="regress", csv=str(tmp_path / "flat.csv")).resolved())


def test_diverged_training_is_one_message(folder, tmp_path, capfd):
    for task, csv, small in (("forecast", "waves.csv", SMALL), ("regress", "datatry.csv", TINY)):
        words = ["train", "informer", "--task", task, "--csv", str(folder / csv), *small, "--lr", "1e30"]
        assert main([*words, "--out", str(tmp_path)]) == 2
        shown = capfd.readouterr().err
        assert "is not finite" in shown
        assert "lower lr" in shown
        assert "Traceback" not in shown
    assert not list(tmp_path.rglob("results.json"))


def test_wrong_input_to_predict_is_named(run, folder, tmp_path, capfd):
    waves(40).to_csv(tmp_path / "short.csv", index=False)
    daily = waves(40).assign(date=pd.date_range("2020-01-01", periods=40).astype(str))
    daily.to_csv(tmp_path / "daily.csv", index=False)
    waves(10).to_csv(tmp_path / "ten.csv", index=False)
    waves(40).drop(columns="b").to_csv(tmp_path / "less.csv", index=False)
    for words, message in (
        ([str(run)], "or a table with --from data.csv"),
        ([str(run), "x.png"], "--from data.csv"),
        ([str(run), "x.csv"], "--from x.csv"),
        ([str(run), "x.png", "--from", "y.csv"], "'x.png' is one too many"),
        ([str(run), "--from", str(tmp_path / "none.csv")], "there is no file"),
        ([str(run), "--from", str(tmp_path / "ten.csv")], "has 10 rows, and the model needs the last 24"),
        (
            [str(run), "--from", str(tmp_path / "daily.csv")],
            "has a row every 24h, and the model was trained on a row every h",
        ),
        ([str(run), "--from", str(tmp_path / "less.csv")], "no column 'b'"),
    ):
        assert main(["predict", *words, "--device", "cpu"]) == 2, words
        assert message in capfd.readouterr().err


def test_missing_values_in_a_file_to_predict_are_filled_on_request(run, table_run, folder, tmp_path, capfd):
    frame = waves()
    frame.loc[590, "b"] = float("nan")
    frame.to_csv(tmp_path / "gap.csv", index=False)
    words = ["predict", str(run), "--from", str(tmp_path / "gap.csv"), "--device", "cpu"]
    assert main(words) == 2
    assert "line 592, column 3 (b); complete or remove these rows, or give --fill true" in capfd.readouterr().err
    assert main([*words, "--fill", "true"]) == 0
    assert main(["predict", str(run), "x.png", "--fill"]) == 2
    frame = pd.read_csv(folder / "datatry.csv")
    frame.loc[3, "SWAT"] = float("nan")  # not known yet
    frame.to_csv(tmp_path / "new.csv", index=False)
    assert main(["predict", str(table_run), "--from", str(tmp_path / "new.csv"), "--device", "cpu"]) == 0
    written = {path.name for path in (table_run / "predictions").iterdir()}
    assert {"new.csv", "new-Pressure.png"} <= written
    assert "new-SWAT.png" not in written


def test_eval_uses_columns_and_standardization_of_the_run(run, table_run, folder, tmp_path, capfd):
    for kind, finished, csv in (("forecast", run, "waves.csv"), ("regress", table_run, "datatry.csv")):
        copied = shutil.copytree(finished, tmp_path / kind)
        frame = pd.read_csv(folder / csv)
        shuffled = frame[frame.columns[::-1]]
        shuffled.insert(0, "new", range(len(frame)))
        config = (copied / "config.yml").read_text().replace(str(folder / csv), str(tmp_path / csv))
        (copied / "config.yml").write_text(config)
        shuffled.to_csv(tmp_path / csv, index=False)
        assert main(["eval", str(copied)]) == 0
        found, again = results(finished), json.loads((copied / "evaluation.json").read_text())
        assert {name: found[name] for name in again} == again
        shuffled[: len(frame) // 2].to_csv(tmp_path / csv, index=False)
        capfd.readouterr()
        assert main(["eval", str(copied)]) == 2
        assert "evaluate with the file of the training" in capfd.readouterr().err


def test_resume_with_other_rows_or_lengths_is_an_error(run, table_run, capfd):
    for finished, option, value in (
        (run, "pred_len", "8"),
        (run, "targets", "OT"),
        (table_run, "split_seed", "1"),
        (table_run, "train_rows", "100"),
        (table_run, "inputs", "1-5"),
    ):
        assert main(["train", "informer", "--resume", str(finished), f"--{option}", value]) == 2
        assert f"{option}={value} does not fit the checkpoint of this run" in capfd.readouterr().err


def test_resume_with_other_data_is_an_error_but_not_with_moved_data(run, table_run, folder, tmp_path, capfd):
    """Other data would give the weights another scaling, and a test on rows of the training."""
    for finished, csv in ((run, "waves.csv"), (table_run, "datatry.csv")):
        copied = shutil.copytree(finished, tmp_path / finished.name)
        moved = Path(shutil.copy(folder / csv, tmp_path / csv))
        assert main(["train", "informer", "--resume", str(copied), "--csv", str(moved)]) == 0
        before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
        frame = pd.read_csv(moved)
        for other in (frame[: len(frame) - 60], frame.assign(**{frame.columns[-1]: frame[frame.columns[-1]] * 1.01})):
            other.to_csv(moved, index=False)
            assert main(["train", "informer", "--resume", str(copied), "--csv", str(moved)]) == 2
            assert f"{moved} differs from the data that the run {copied} began with" in capfd.readouterr().err
        assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before


def test_eval_finds_a_moved_file_below_the_root(run, folder, tmp_path, capfd):
    copied = shutil.copytree(run, tmp_path / "copied")
    config = copied / "config.yml"
    config.write_text(config.read_text().replace(str(folder / "waves.csv"), "waves.csv"))
    shutil.copy(folder / "waves.csv", tmp_path)
    assert main(["eval", str(copied), "--root", str(tmp_path)]) == 0
    assert main(["eval", str(copied), "--root", str(copied)]) == 2
    assert f"there is no file {copied / 'waves.csv'}" in capfd.readouterr().err


def test_run_without_a_checkpoint_warns_that_it_starts_again(run, tmp_path, caplog):
    copied = shutil.copytree(run, tmp_path / "copied")
    shutil.rmtree(copied / "checkpoint")
    assert main(["train", "informer", "--resume", str(copied)]) == 0
    assert f"{copied} has no checkpoint" in caplog.text


def test_column_names_that_no_file_can_have_are_replaced(folder, tmp_path, capsys):
    frame = pd.read_csv(folder / "datatry.csv").rename(columns={"Pressure": "Q (m3/s)", "SWAT": "Q [m3/s]"})
    frame.to_csv(tmp_path / "my table.csv", index=False)
    words = ["--task", "regress", "--csv", str(tmp_path / "my table.csv"), *TINY, "--epochs", "1"]
    run = trained(tmp_path, "out", *words)
    names = {path.name for path in (run / "plots").glob("scatter*")}
    assert names == {"scatter_Q-m3-s.png", "scatter_Q-m3-s-2.png"}
    following = capsys.readouterr().out.splitlines()[-1]
    assert main(shlex.split(following)[2:]) == 0
    assert {path.suffix for path in (run / "predictions").iterdir()} == {".csv", ".png"}


@pytest.mark.parametrize(("step", "steps"), [("MS", 34), ("h", 66), ("min", 170)])
def test_date_axis_raises_no_warning(tmp_path, step, steps):
    series = TimeSeries(
        "s", pd.date_range("2020-01-01", periods=steps - 4, freq=step), torch.randn(steps - 4, 1), ("x",)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.plot_future(tmp_path / "p.png", series, [0], series.future_dates(4), torch.randn(4, 1), history=steps)


def test_forecast_of_one_step_is_visible(folder, tmp_path):
    words = [*SMALL, "--pred_len", "1", "--epochs", "1", "--baselines", "false"]
    run = trained(tmp_path, "out", "--csv", str(folder / "waves.csv"), *words)
    with Image.open(run / "plots" / "forecasts.png") as picture:
        below_the_legend = picture.convert("RGB").crop((0, 60, *picture.size))
        colors = {color: count for count, color in below_the_legend.getcolors(2**24)}
    assert colors.get((213, 94, 0), 0) > 100


def test_interrupt_during_the_baselines_names_the_resume_command(folder, tmp_path, monkeypatch, caplog):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("duoka.recipes.time_series.baselines.dlinear", stop)
    words = ["--csv", str(folder / "waves.csv"), *SMALL, "--epochs", "1", "--out", str(tmp_path)]
    assert main(["train", "informer", *words]) == 130
    assert "duoka train informer --resume" in caplog.text


def test_small_errors_are_printed_with_digits(folder, tmp_path, capsys):
    frame = pd.read_csv(folder / "datatry.csv")
    frame["Pressure"] *= 1e-15
    frame["SWAT"] *= 1e-15
    frame.to_csv(tmp_path / "small.csv", index=False)
    trained(tmp_path, "out", "--task", "regress", "--csv", str(tmp_path / "small.csv"), *TINY, "--epochs", "1")
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("test rmse"))
    assert 1e-14 < float(line.split()[-1]) < 1e-13


def test_only_the_first_of_many_columns_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "MAX_COLUMNS", 5)
    series = TimeSeries("many", pd.date_range("2020-01-01", periods=30, freq="h"), torch.randn(30, 40), tuple("x" * 40))
    plots.plot_future(tmp_path / "p.png", series, range(40), series.future_dates(2), torch.randn(2, 40), history=9)
    plots.plot_residuals(tmp_path / "r.png", torch.randn(9, 30), [str(number) for number in range(30)])
    for name in ("p.png", "r.png"):
        with Image.open(tmp_path / name) as picture:
            assert max(picture.size) < 2600
            colors = {color: count for count, color in picture.convert("RGB").getcolors(2**24)}
        assert max(count for color, count in colors.items() if color != (255, 255, 255) and color[2] > 150) > 2000


def test_printed_next_step_works(folder, tmp_path, capsys):
    capsys.readouterr()
    words = [*SMALL, "--seq_len", "20", "--epochs", "1"]  # shorter than a day
    run = trained(tmp_path, "out", "--csv", str(folder / "waves.csv"), *words)
    text = (run / "evaluation_results.txt").read_text()
    assert "No last season: the past of 20 steps is shorter than one of 24." in text
    assert "test: 2021-03-21 00:00:00 to 2021-03-25 23:00:00" in text
    following = capsys.readouterr().out.splitlines()[-1]
    assert main(shlex.split(following)[2:]) == 0


def test_resumed_forecast_is_bit_identical_to_an_uninterrupted_one(run, folder, tmp_path):
    half = trained(tmp_path, "out", "-c", str(run / "config.yml"), "--epochs", "1")
    assert main(["train", "informer", "--resume", str(half), "--epochs", "2"]) == 0
    whole, resumed = load_file(run / "model.safetensors"), load_file(half / "model.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert results(run)["standardised"] == results(half)["standardised"]


@pytest.mark.parametrize("task", ["forecast", "regress"])
def test_failed_resume_leaves_the_run_unchanged(run, table_run, tmp_path, capfd, task):
    copied = shutil.copytree({"forecast": run, "regress": table_run}[task], tmp_path / "copied")
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    for path in (copied / "checkpoint").iterdir():
        path.write_bytes(b"damaged")
        before[path] = b"damaged"
    assert main(["train", "informer", "--resume", str(copied), "--seed", "5"]) == 2
    assert "last.pt" in capfd.readouterr().err
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before


def test_missing_package_names_the_command_that_installs_it(folder, tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "pandas", None)
    words = ["train", "informer", "--csv", str(folder / "waves.csv"), *SMALL, "--out", str(tmp_path)]
    assert main(words) == 2
    assert "pandas is needed for this and is not installed: pip install 'duoka[forecast]'" in capfd.readouterr().err


@needs_file(ETTH1)
def test_small_model_learns_the_real_series(tmp_path):
    words = [
        "--csv",
        str(ETTH1),
        "--features",
        "S",
        "--seq_len",
        "48",
        "--label_len",
        "24",
        *SMALL[:8],
        "--lr",
        "0.003",
    ]
    found = results(trained(tmp_path, "out", *words, "--epochs", "1", "--batch_size", "256", "--baselines", "false"))
    assert found["windows"] == {"training": 8569, "validation": 2857, "test": 2857}
    assert found["test_mse"] < 0.3
