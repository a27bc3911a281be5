"""``duoka predict``: predictions of a finished run from image files."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps

from duoka.cli.main import main
from duoka.recipes.common.config import config_of_run
from duoka.recipes.common.recipe_run import RecipeRun
from duoka.recipes.datasets.images import load_digits, write_image
from duoka.recipes.image_classification.config import Cifar100Config
from duoka.recipes.image_classification.presets import CIFAR100


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """So small a model is fastest on one thread, and much slower on two that other processes want as well."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run that knows the digits fairly well."""
    out = tmp_path_factory.mktemp("out")
    options = ["--dataset", "digits", "--device", "cpu", "--epochs", "4", "--width", "0.125", "--out", str(out)]
    assert main(["train", "cifar100", *options]) == 0
    (folder,) = (out / "cifar100").iterdir()
    return folder


@pytest.fixture
def ask(run, capsys):
    def answers(*words: str) -> list[dict]:
        capsys.readouterr()
        assert main(["predict", str(run), *words, "--json", "--device", "cpu"]) == 0
        return json.loads(capsys.readouterr().out)

    return answers


def test_predictions_from_image_files_equal_those_of_training(run, tmp_path):
    test = load_digits().test
    sources = []
    for number in range(len(test)):
        write_image(tmp_path / f"{number}.png", test.pixels[number])
        sources.append(str(tmp_path / f"{number}.png"))
    found = CIFAR100.predict(RecipeRun.at(run), config_of_run(Cifar100Config, RecipeRun.at(run)), sources)
    right = sum(answer.ranked[0][0] == str(int(label)) for answer, label in zip(found, test.labels, strict=True))
    results = json.loads((run / "results.json").read_text())
    assert right / len(test) == pytest.approx(results["test_accuracy"])
    assert right / len(test) > 0.8
    assert all(sum(value for _, value in answer.ranked) == pytest.approx(1) for answer in found)


def test_each_image_has_a_line_with_the_likeliest_classes(run, capsys):
    capsys.readouterr()
    images = [str(run / "samples" / f"{digit}.png") for digit in (0, 6)]
    assert main(["predict", str(run), *images, "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == images
    assert all(line.count("%") == 2 for line in lines)


def test_json_has_class_probability_and_the_next_ones(run, ask):
    (answer,) = ask(str(run / "samples" / "0.png"), "--top", "4")
    assert answer["input"].endswith("0.png")
    assert answer["top"][0]["class"] == answer["class"]
    values = [entry["probability"] for entry in answer["top"]]
    assert len(values) == 4
    assert values == sorted(values, reverse=True)
    assert answer["probability"] == values[0]


def test_images_of_any_size_color_and_kind_are_accepted(run, ask, tmp_path):
    with Image.open(run / "samples" / "0.png") as image:
        image.resize((80, 80)).convert("RGB").save(tmp_path / "big.jpg", quality=95)
        ImageOps.invert(image).save(tmp_path / "on-paper.png")
    plain, big = ask(str(run / "samples" / "0.png"), str(tmp_path / "big.jpg"))
    assert big["class"] == plain["class"] == "0"
    (inverted,) = ask(str(tmp_path / "on-paper.png"), "--invert")
    assert inverted["class"] == "0"
    assert inverted["probability"] == pytest.approx(plain["probability"], abs=1e-5)


def test_a_prediction_does_not_depend_on_other_images(run, ask):
    names = [str(run / "samples" / f"{digit}.png") for digit in range(10)]
    together = [answer["probability"] for answer in ask(*names)]
    alone = [ask(name)[0]["probability"] for name in names]
    assert torch.allclose(torch.tensor(together), torch.tensor(alone), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.png", "there is no image none.png"),
        ("text.png", "cannot read the image text.png"),
        (".", ". is a folder, not an image"),
    ],
)
def test_an_image_that_cannot_be_read_is_one_message(run, tmp_path, monkeypatch, capfd, name, message):
    monkeypatch.chdir(tmp_path)
    Path("text.png").write_text("not an image")
    capfd.readouterr()
    assert main(["predict", str(run), str(run / "samples" / "0.png"), name]) == 2
    shown = capfd.readouterr()
    assert message in shown.err
    assert shown.out == ""


def test_results_without_what_prediction_needs_are_one_message(run, tmp_path, capfd):
    copied = shutil.copytree(run, tmp_path / "run")
    (copied / "results.json").write_text("{}")
    assert main(["predict", str(copied), "any.png"]) == 2
    assert re.search(
        "results.json: the content has no key 'images': `.*duoka train cifar100 --resume", capfd.readouterr().err
    )


@pytest.mark.parametrize("top", ["0", "-1", "x"])
def test_an_invalid_number_of_answers_is_refused(run, capfd, top):
    capfd.readouterr()
    assert main(["predict", str(run), "any.png", f"--top={top}"]) == 2
    message = capfd.readouterr().err
    assert "--top=" in message
    assert "it must be an integer" in message


def test_predicting_with_an_unfinished_run_names_the_remedy(run, tmp_path, capfd):
    (tmp_path / "config.yml").write_bytes((run / "config.yml").read_bytes())
    assert main(["predict", str(tmp_path), "x.png"]) == 2
    assert f"duoka train cifar100 --resume {tmp_path}" in capfd.readouterr().err


def test_truncated_weights_are_refused(run, tmp_path, capfd):
    for name in ("config.yml", "results.json"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    weights = (run / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert main(["predict", str(tmp_path), str(run / "samples" / "0.png")]) == 2
    assert "model.safetensors" in capfd.readouterr().err
