"""``duoka data make``: the files, the printed results, and mistakes."""

import shlex

import pytest

from duoka.cli.main import main
from duoka.recipes.datasets import csv_table


def test_example_data_are_written_with_the_best_reachable_result(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["data", "make", "datatry", "--rows", "500"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "wrote datatry.csv: 500 rows, 10 features, then Pressure and SWAT"
    assert [line.split(":")[0] for line in lines[1:3]] == [
        f"best reachable R² of {name}" for name in ("Pressure", "SWAT")
    ]
    found = csv_table.read(tmp_path / "datatry.csv")
    assert (len(found), len(found.columns)) == (500, 12)
    words = shlex.split(lines[3])[2:]  # after "next: duoka"
    assert main([*words, "--epochs", "1", "--device", "cpu", "--width", "16", "--hidden", "16"]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rows", "1"], "--rows=1 is not valid"),
        (["--rows", str(10**15)], "2 to 10,000,000"),
        (["--to", "file/d.csv"], "file"),
        (["--seed", "-1"], "--seed=-1 is not valid"),
        (["--seed", str(2**63)], f"--seed={2**63} is not valid"),
    ],
)
def test_a_mistake_is_one_message(tmp_path, monkeypatch, capfd, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    assert main(["data", "make", "datatry", *words]) == 2
    shown = capfd.readouterr().err
    assert message in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize(
    ("example", "file", "sizes"),
    [
        ("datatry", "data", ["--rows", "20"]),
        ("movielens", "data/ratings.dat", ["--users", "20", "--films", "30", "--ratings", "300"]),
    ],
)
def test_existing_files_are_not_overwritten(tmp_path, monkeypatch, capsys, example, file, sizes):
    """It may be the real data: an example has their format."""
    monkeypatch.chdir(tmp_path)
    place = tmp_path / file
    place.parent.mkdir(exist_ok=True)
    place.write_text("1::2::5::978300760")
    command = ["data", "make", example, "--to", "data", *sizes]
    assert main(command) == 2
    assert f"{file} exists already: give another path with --to, or --overwrite" in capsys.readouterr().err
    assert place.read_text() == "1::2::5::978300760"
    assert main([*command, "--overwrite"]) == 0
    assert len(place.read_text()) > 100


def test_example_is_not_written_beside_the_official_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "ml-1m").mkdir(parents=True)
    assert main(["data", "make", "movielens", "--to", "data", "--overwrite"]) == 2
    assert "data/ml-1m is there, which --root data reads: give another path with --to" in capsys.readouterr().err
    assert not (tmp_path / "data" / "ratings.dat").exists()
