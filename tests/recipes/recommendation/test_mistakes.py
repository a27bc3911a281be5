"""The recipe ``movielens`` where a user errs after training: data that have moved or changed, options, Ctrl-C at the end."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from duoka.cli.main import main
from duoka.recipes import recommendation
from duoka.recipes.datasets import synthetic_movielens

QUICK = ["--model", "ncf", "--embedding_size", "8", "--epochs", "1", "--device", "cpu"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("movielens")
    synthetic_movielens.write(folder, synthetic_movielens.make(60, 50, 1_300))
    return folder


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    """A finished run; no test changes it."""
    out = tmp_path_factory.mktemp("runs")
    options = [*QUICK, "--root", str(data), "--out", str(out), "--baselines", "false"]
    assert main(["train", "movielens", *options]) == 0
    (run,) = (out / "movielens").iterdir()
    return run


def changed(data: Path, folder: Path, name: str, old: str, new: str) -> str:
    """Copy the set with ``old`` replaced in one of its files; return the folder."""
    shutil.copytree(data, folder)
    text = (folder / name).read_text(encoding="latin-1")
    assert old in text
    (folder / name).write_text(text.replace(old, new, 1), encoding="latin-1")
    return str(folder)


def last_line(data: Path) -> str:
    return (data / "ratings.dat").read_text().splitlines()[-1] + "\n"


def test_ratings_that_were_learned_are_not_the_test_of_a_run_whose_data_changed(run, data, tmp_path, capsys):
    """The split is of all ratings: with one less, others are for training and for the test."""
    shorter = changed(data, tmp_path / "shorter", "ratings.dat", last_line(data), "")
    user, _, stars, seconds = last_line(data).split("::")
    rated = {line.split("::")[1] for line in (data / "ratings.dat").read_text().splitlines() if line.startswith("60::")}
    films = (data / "movies.dat").read_text(encoding="latin-1").splitlines()
    other = next(line.split("::")[0] for line in films if line.split("::")[0] not in rated)
    swapped = changed(data, tmp_path / "other", "ratings.dat", last_line(data), f"60::{other}::{stars}::{seconds}")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for root, words in ((shorter, "ratings in its "), (swapped, "has other ratings than those that the run")):
        for command in (["eval", str(run)], ["train", "movielens", "--resume", str(run)]):
            assert main([*command, "--root", root]) == 2
            said = capsys.readouterr().err
            assert words in said
            assert said.endswith("give the set of then with --root\n")
        assert main(["recommend", str(run), "--user", user, "--root", root]) == 0  # who has rated more may ask
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_who_has_rated_all_films_is_told_so(run, data, tmp_path, capsys):
    rated = {line.split("::")[1] for line in (data / "ratings.dat").read_text().splitlines() if line.startswith("60::")}
    films = [line.split("::")[0] for line in (data / "movies.dat").read_text(encoding="latin-1").splitlines()]
    more = "".join(f"60::{film}::3::1000000000\n" for film in films if film not in rated)
    root = changed(data, tmp_path / "all", "ratings.dat", last_line(data), last_line(data) + more)
    assert main(["recommend", str(run), "--user", "60", "--root", root]) == 0
    assert capsys.readouterr().out.endswith("has rated 50 films\nthere is no film that the user has not rated\n")


def test_films_of_other_names_are_not_recommended(run, data, tmp_path, capsys):
    film = (data / "movies.dat").read_text(encoding="latin-1").splitlines()[3]
    number, _, genres = film.split("::")
    renamed = changed(data, tmp_path / "renamed", "movies.dat", film, f"{number}::Another One (1990)::{genres}")
    for command in (["eval", str(run)], ["recommend", str(run), "--user", "1"]):
        assert main([*command, "--root", renamed]) == 2
        assert (
            f"{renamed} has other users or films than those that the run {run} was trained on"
            in capsys.readouterr().err
        )


def test_data_that_have_moved_are_asked_for_and_not_downloaded(run, data, tmp_path, capsys):
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
        words = f"{gone} is not there, where the run {moved} had its data: give their folder with --root"
        assert words in capsys.readouterr().err
        assert not gone.exists()
    assert main(["eval", str(moved), "--root", str(data)]) == 0
    again, found = (json.loads((moved / name).read_text()) for name in ("evaluation.json", "results.json"))
    assert again["test"] == pytest.approx(found["test"]["ncf (stage 1)"], abs=1e-9)


def test_a_run_does_not_go_on_with_the_gpt2_of_another_seed(run, capsys):
    assert main(["train", "movielens", "--resume", str(run), "--seed", "5"]) == 2
    assert "`seed` was 0 in this run and is 5 now" in capsys.readouterr().err


def test_a_stop_while_baselines_are_trained_says_how_to_go_on(data, tmp_path, monkeypatch, caplog):
    """Ctrl-C once all stages are done; going on makes the rest."""
    pytest.importorskip("transformers")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    options = ["--pretrained", "none", "--device", "cpu", "--dynamic_epochs", "0", "--epochs", "1"]
    options += ["--root", str(data), "--out", str(tmp_path), "--embedding_size", "8"]
    with monkeypatch.context() as patched:
        patched.setattr(recommendation, "train_ncf", stop)
        assert main(["train", "movielens", *options]) == 130
    (stopped,) = (tmp_path / "movielens").iterdir()
    assert f"go on with: duoka train movielens --resume {stopped}" in caplog.text
    assert not (stopped / "model.safetensors").exists()
    assert main(["train", "movielens", "--resume", str(stopped)]) == 0
    assert "ncf" in json.loads((stopped / "results.json").read_text())["test"]
