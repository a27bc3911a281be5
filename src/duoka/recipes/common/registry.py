"""Table of recipes, and the interface that ``duoka train``, ``eval`` and ``predict`` use."""

import importlib
from pathlib import Path
from typing import Any, NamedTuple

from duoka.errors import ConfigError
from duoka.recipes.common.recipe_run import RecipeRun
from duoka.utils.text import did_you_mean, join_names


class RecipeOutcome(NamedTuple):
    """Result of a finished training or evaluation."""

    run: RecipeRun
    """Folder of the run."""
    results: dict[str, float]
    """Named numbers, such as ``{"test_accuracy": 0.98}``."""
    next_step: str
    """Command to continue with."""


class Prediction(NamedTuple):
    """Answer of a trained model to one input."""

    source: str
    """Input, as the user named it."""
    ranked: tuple[tuple[str, float], ...]
    """Answers and their probabilities, most likely first."""


class PredictedTable(NamedTuple):
    """Files that a trained model has written for a table."""

    files: tuple[Path, ...]
    summary: str
    """One line about the files."""


class RecipeEntry(NamedTuple):
    """Row of the table."""

    module: str
    """The recipe: a module, or ``module:object``."""
    summary: str


RECIPES = {
    "cifar100": RecipeEntry(
        "duoka.recipes.image_classification.presets:CIFAR100",
        "ResNets on CIFAR-100, CIFAR-10, a folder of images, or handwritten digits",
    ),
    "tiny-imagenet": RecipeEntry(
        "duoka.recipes.image_classification.presets:TINY_IMAGENET",
        "five networks on Tiny-ImageNet, CIFAR-10 or CIFAR-100: experiments for `duoka compare`",
    ),
    "informer": RecipeEntry("duoka.recipes.time_series", "forecasts of series, and predictions of a table's columns"),
    "movielens": RecipeEntry(
        "duoka.recipes.recommendation", "film recommendations from ratings and a GPT-2's text vectors"
    ),
}


def find_recipe(name: str) -> Any:
    """Return the recipe ``name``, a module or an object with this interface:

    - ``Config``: subclass of ``RunOptions``.
    - ``train(config) -> RecipeOutcome`` trains, evaluates and writes the run's folder.
    - ``evaluate(run, config) -> RecipeOutcome`` evaluates the model of a finished run; ``config`` is the run's own,
      possibly with another device.
    - ``predict(run, config, sources, *, invert=False) -> list[Prediction]`` returns the answers of a finished run's model.
    - ``predict_table(run, config, source) -> PredictedTable``, only of a recipe that reads tables.
    - ``load(config)`` reads the data; a recipe that has it gets them checked before a comparison begins.

    Raises ConfigError if there is no such recipe.
    """
    if name not in RECIPES:
        hint = did_you_mean(name, RECIPES) or f"the recipes are {join_names(RECIPES)}"
        raise ConfigError(f"there is no recipe {name!r}; {hint}")
    module, _, attribute = RECIPES[name].module.partition(":")
    recipe = importlib.import_module(module)
    return getattr(recipe, attribute) if attribute else recipe
