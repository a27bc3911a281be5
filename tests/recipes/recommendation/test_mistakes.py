"""The recipe ``movielens`` after training: data that moved or changed, changed options, and Ctrl-C at the end."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from duoka.cli.main import main
from duoka.recipes.datasets import synthetic_movielens
from duoka.recipes.recommendation import training

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = ["--model", "ncf", "--embedding_size", "8", "--epochs", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("movielens")
    synthetic_movielens.write(folder, synthetic_movielens.make(60, 50, 1_300))
    return folder


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    """A finished run that no test changes."""
    out = tmp_path_factory.mktemp("runs")
    options = [*QUICK, "--root", str(data), "--out", str(out), "--baselines", "false"]
    assert main(["train", "movielens", *options]) == 0
    (run,) = (out / "movielens").iterdir()
    return run


def copy_with(data: Path, folder: Path, name: str, old: str, new: str) -> str:
    """Copy the data with ``old`` replaced by ``new`` in one file; return the folder."""
    shutil.copytree(data, folder)
    text = (folder / name).read_text(encoding="latin-1")
    assert old in text
    (folder / name).write_text(text.replace(old, new, 1), encoding="latin-1")
    return str(folder)


def last_line(data: Path) -> str:
    return (data / "ratings.dat").read_text().splitlines()[-1] + "\n"


def test_a_run_is_not_tested_or_resumed_with_changed_ratings(run, data, tmp_path, capsys):
    """Any changed rating changes the whole split, so training ratings would be in the test."""
    shorter = copy_with(data, tmp_path / "shorter", "ratings.dat", last_line(data), "")
    user, _, stars, seconds = last_line(data).split("::")
    rated = {line.split("::")[1] for line in (data / "ratings.dat").read_text().splitlines() if line.startswith("60::")}
    films = (data / "movies.dat").read_text(encoding="latin-1").splitlines()
    other = next(line.split("::")[0] for line in films if line.split("::")[0] not in rated)
    swapped = copy_with(data, tmp_path / "other", "ratings.dat", last_line(data), f"60::{other}::{stars}::{seconds}")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for root, key in ((shorter, "train is"), (swapped, "parts is")):
        for command in (["eval", str(run)], ["train", "movielens", "--resume", str(run)]):
            assert main([*command, "--root", root]) == 2
            message = capsys.readouterr().err
            assert root in message
            assert key in message
        assert main(["recommend", str(run), "--user", user, "--root", root]) == 0  # a user may have rated more
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_user_who_has_rated_all_films_gets_a_message(run, data, tmp_path, capsys):
    rated = {line.split("::")[1] for line in (data / "ratings.dat").read_text().splitlines() if line.startswith("60::")}
    films = [line.split("::")[0] for line in (data / "movies.dat").read_text(encoding="latin-1").splitlines()]
    more = "".join(f"60::{film}::3::1000000000\n" for film in films if film not in rated)
    root = copy_with(data, tmp_path / "all", "ratings.dat", last_line(data), last_line(data) + more)
    assert main(["recommend", str(run), "--user", "60", "--root", root]) == 0
    assert capsys.readouterr().out.endswith("has rated 50 films\nthere is no film that the user has not rated\n")


def test_renamed_films_are_rejected(run, data, tmp_path, capsys):
    film = (data / "movies.dat").read_text(encoding="latin-1").splitlines()[3]
    number, _, genres = film.split("::")
    renamed = copy_with(data, tmp_path / "renamed", "movies.dat", film, f"{number}::Another One (1990)::{genres}")
    for command in (["eval", str(run)], ["recommend", str(run), "--user", "1"]):
        assert main([*command, "--root", renamed]) == 2
        message = capsys.readouterr().err
        assert renamed in message
        assert "entities is" in message


def test_missing_data_of_a_run_are_not_downloaded(run, data, tmp_path, capsys):
    moved, gone = tmp_path / "run", tmp_path / "gone"
    shutil.copytree(run, moved)
    options = yaml.safe_load((moved / "config.yml").read_text())
    (moved / "config.yml").write_text(yaml.safe_dump({**options, "root": str(gone)}))
    for command in (
        ["eval", str(moved)],
        ["recommend", str(moved), "--user", "1"],
        ["train", "movielens", "--resume", str(moved)],
    ):
        assert main(command) == 2
        assert f"root={gone}, the data folder of the run {moved}, does not exist" in capsys.readouterr().err
        assert not gone.exists()
    assert main(["eval", str(moved), "--root", str(data)]) == 0
    again, found = (json.loads((moved / name).read_text()) for name in ("evaluation.json", "results.json"))
    assert again["test"] == pytest.approx(found["test"]["ncf (stage 1)"], abs=1e-9)


def test_a_run_does_not_resume_with_another_seed(run, capsys):
    assert main(["train", "movielens", "--resume", str(run), "--seed", "5"]) == 2
    assert "seed=5 does not fit the checkpoint of this run, which has seed=0" in capsys.readouterr().err


def test_a_stop_during_baseline_training_prints_how_to_resume(data, tmp_path, monkeypatch, caplog):
    """Ctrl-C after both stages; resuming computes the rest."""
    pytest.importorskip("transformers")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    options = ["--pretrained", "none", "--device", "cpu", "--dynamic_epochs", "0", "--epochs", "1"]
    options += ["--root", str(data), "--out", str(tmp_path), "--embedding_size", "8"]
    with monkeypatch.context() as patched:
        patched.setattr(training, "train_ncf", stop)
        assert main(["train", "movielens", *options]) == 130
    (stopped,) = (tmp_path / "movielens").iterdir()
    assert f"duoka train movielens --resume {stopped}" in caplog.text
    assert not (stopped / "model.safetensors").exists()
    assert main(["train", "movielens", "--resume", str(stopped)]) == 0
    assert "ncf" in json.loads((stopped / "results.json").read_text())["test"]
