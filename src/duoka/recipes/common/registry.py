"""The table of recipes: what `duoka train`, `eval` and `predict` know of them, and all they know."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from duoka.errors import ConfigError
from duoka.recipes.common.recipe_run import RecipeRun

__all__ = ["RECIPES", "RecipeOutcome", "Prediction", "Recipe", "Written", "find"]


@dataclass(frozen=True)
class RecipeOutcome:
    """What a finished training or evaluation tells the user."""

    run: RecipeRun
    """The folder where everything lies."""
    results: dict[str, float]
    """Named numbers, such as ``{"test_accuracy": 0.98}``."""
    next_step: str
    """A command to go on with."""


@dataclass(frozen=True)
class Prediction:
    """What a trained model says of one input."""

    source: str
    """The input, as the user named it."""
    ranked: tuple[tuple[str, float], ...]
    """Answers and their probabilities, the likeliest first."""


@dataclass(frozen=True)
class Written:
    """What a trained model made of a table."""

    files: tuple[Path, ...]
    """What was written."""
    summary: str
    """One line about it."""


class Recipe(Protocol):
    """What a recipe's module offers; one that reads tables also has ``predict_table(run, config, source) -> Written``.

    One that has ``load(config)``, which reads its data, and names in ``Config.DATA`` the options that these depend on, has its
    data checked before a comparison begins.
    """

    Config: type[Any]
    """A frozen dataclass whose fields are the options; each has its meaning as a docstring below it."""

    def train(self, config: Any) -> RecipeOutcome:
        """Train, evaluate and write the run's folder."""

    def evaluate(self, run: RecipeRun, config: Any) -> RecipeOutcome:
        """Evaluate the model of a finished run; ``config`` is the run's own, with another device perhaps."""

    def predict(self, run: RecipeRun, config: Any, sources: Sequence[str], *, invert: bool = False) -> list[Prediction]:
        """Say what the model of a finished run makes of each source."""


@dataclass(frozen=True)
class Entry:
    """A row of the table."""

    module: str
    """The recipe: a module, or ``module:object``."""
    summary: str


RECIPES = {
    "cifar100": Entry(
        "duoka.recipes.image_classification.presets:CIFAR100",
        "ResNets on CIFAR-100, CIFAR-10, a folder of images, or handwritten digits",
    ),
    "tiny-imagenet": Entry(
        "duoka.recipes.image_classification.presets:TINY_IMAGENET",
        "five networks on Tiny-ImageNet, CIFAR-10 or CIFAR-100: experiments for `duoka compare`",
    ),
    "informer": Entry("duoka.recipes.time_series", "forecasts of series, and numbers from a table's other columns"),
    "movielens": Entry(
        "duoka.recipes.recommendation", "films for people, by what they have seen and what a GPT-2 reads"
    ),
}


def find(name: str) -> Recipe:
    """Return the recipe called ``name``.

    Raises:
        ConfigError: there is none; the message lists what there is.

    """
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean `{close[0]}`?" if close else f"there is {', '.join(RECIPES)}"
        raise ConfigError(f"there is no recipe `{name}`: {hint}")
    module, _, attribute = RECIPES[name].module.partition(":")
    recipe: Any = importlib.import_module(module)
    return cast("Recipe", getattr(recipe, attribute) if attribute else recipe)
