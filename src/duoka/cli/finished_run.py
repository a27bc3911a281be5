"""Arguments of the commands that use a finished run, and the run that they name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from duoka.recipes.common.recipe_run import RecipeRun
    from duoka.utils.argument_parser import ArgumentParser


def add_run_arguments(parser: ArgumentParser, *, device: str | None = None, root: bool = True) -> None:
    """Add RUN, ``--device`` and ``--root``; a default of ``None`` is the run's own value."""
    default = "the run's own" if device is None else device
    parser.add_argument("run", metavar="RUN", help="folder of the run, as `duoka train` has printed it")
    parser.add_argument(
        "--device", "--devices", default=device, metavar="SPEC", help=f"devices to compute on (default: {default})"
    )
    if root:
        parser.add_argument("--root", default=None, metavar="DIR", help="folder of the data (default: the run's own)")


def load_run(options: Namespace) -> tuple[RecipeRun, Any, Any]:
    """Return the run that the options name, its recipe's module, and its configuration with the options' changes."""
    from duoka.recipes.common.config import config_of_run
    from duoka.recipes.common.recipe_run import RecipeRun
    from duoka.recipes.common.registry import find_recipe

    run = RecipeRun.at(options.run)
    recipe = find_recipe(run.recipe())
    config: Any = config_of_run(recipe.Config, run)
    changed = {key: value for key in ("device", "root") if (value := options.get(key)) is not None}
    if "root" in changed and getattr(config, "csv", None):
        changed["csv"] = str(Path(options.root) / Path(config.csv).name)  # the run's file, in its new folder
    return run, recipe, dataclasses.replace(config, **changed)
