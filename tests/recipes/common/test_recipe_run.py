"""Run folders: created once each, found again, and refused with a reason."""

import shutil
from typing import Any

import pytest
from torch import nn

from duoka import save
from duoka.errors import ConfigError, DataError, DivergenceError, StorageError
from duoka.recipes.common import registry
from duoka.recipes.common.recipe_run import RecipeRun, recipe_run
from duoka.recipes.image_classification.config import Cifar100Config


def test_runs_of_the_same_second_and_name_have_separate_folders(tmp_path):
    folders = {RecipeRun.new(tmp_path, "cifar100", "x").folder for _ in range(5)}
    assert len(folders) == 5
    assert all(folder.parent == tmp_path / "cifar100" for folder in folders)


def test_a_folder_that_cannot_be_created_is_named(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(StorageError, match=r"cannot create the run's folder .*out/cifar100.*choose another --out"):
        RecipeRun.new(tmp_path / "out", "cifar100", "x")


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(DataError, match="the folder does not exist"):
        RecipeRun.at(tmp_path / "none")
    (tmp_path / "run" / "checkpoint").mkdir(parents=True)
    for name in ("config.yml", "model.safetensors", "checkpoint/last.pt"):
        (tmp_path / "run" / name).touch()
        with pytest.raises(DataError, match=f"it is a file of the run {tmp_path / 'run'}: give that folder"):
            RecipeRun.at(tmp_path / "run" / name)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(DataError, match="stopped before it began; start it again"):
        RecipeRun.at(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"holds no config\.yml"):
        RecipeRun.at(tmp_path)
    (tmp_path / "trainer.yml").write_text("lr: 1\n")
    with pytest.raises(DataError, match="of a Trainer of your own"):
        RecipeRun.at(tmp_path)
    (tmp_path / "config.yml").write_text("lr: 1\n")
    with pytest.raises(ConfigError, match="does not say which recipe"):
        RecipeRun.at(tmp_path).recipe()


def test_an_unfinished_run_names_the_command_that_finishes_it(tmp_path):
    (tmp_path / "config.yml").write_text("recipe: cifar100\n")
    run = RecipeRun.at(tmp_path)
    for question in (run.finished_model, lambda: run.read_results(dict[str, Any])):
        with pytest.raises(DataError, match="duoka train cifar100 --resume"):
            question()


def test_results_are_read_as_written_and_leave_no_other_file(tmp_path):
    run = RecipeRun(tmp_path)
    run.write_results({"test_accuracy": 0.5, "名": [1]})
    assert run.read_results(dict[str, Any]) == {"test_accuracy": 0.5, "名": [1]}
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_every_recipe_has_the_interface_of_the_commands():
    for name in registry.RECIPES:
        recipe = registry.find_recipe(name)
        for part in ("Config", "train", "evaluate", "predict"):
            assert callable(getattr(recipe, part)), (name, part)


def test_an_unknown_recipe_is_an_error_with_a_suggestion():
    with pytest.raises(ConfigError, match=r"no recipe 'cifar-100'; did you mean 'cifar100'\?"):
        registry.find_recipe("cifar-100")
    with pytest.raises(ConfigError, match="the recipes are cifar100, "):
        registry.find_recipe("zzz")


def test_a_run_interrupted_before_it_writes_leaves_no_folder(tmp_path):
    config = Cifar100Config(out=str(tmp_path / "made" / "runs"), name="x", device="cpu")

    def interrupted(*, late: bool) -> None:
        with recipe_run("cifar100", config) as run:
            if late:
                run.log("begun")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted(late=False)
    assert not list(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        interrupted(late=True)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["log.txt"]


def test_after_a_divergence_a_new_run_with_a_lower_lr_is_named(tmp_path, caplog):
    config = Cifar100Config(out=str(tmp_path), name="x", device="cpu")

    def diverge() -> None:
        with recipe_run("cifar100", config) as run:
            run.write_text("config.yml", "")
            raise DivergenceError

    with pytest.raises(DivergenceError):
        diverge()
    (line,) = [record.getMessage() for record in caplog.records]
    assert "--resume would diverge again. Begin a new run with a lower lr: " in line
    assert line.endswith("config.yml --lr LOWER")


def test_names_of_classes_and_runs_stay_in_their_folders(tmp_path):
    run = RecipeRun.new(tmp_path, "cifar100", "../../outside")
    assert run.folder.parent == tmp_path / "cifar100"
    names = [path.name for path in run.samples(["../x", "/etc/passwd", "a b", "A b"])]
    assert names == ["x.png", "etc-passwd.png", "a-b.png", "A-b-2.png"]
    assert {path.parent for path in run.samples(["../x", "y"])} == {run.folder / "samples"}


def test_options_that_make_a_much_larger_model_are_refused(tmp_path):
    run = RecipeRun(tmp_path)
    run.write_text("config.yml", "recipe: cifar100\n")
    save(nn.Linear(4, 4), run.model)
    assert run.build_finished_model(lambda: nn.Linear(4, 4)).weight.shape == (4, 4)
    with pytest.raises(
        DataError, match=r"the options in .*config.yml make a model of 40.0\d GB, and model.safetensors has"
    ):
        run.build_finished_model(lambda: nn.Linear(100_000, 100_000))
