"""Parsers of the commands, and the arguments that several commands share."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from duoka.cli.main import COMMANDS
from duoka.utils.argument_parser import ArgumentParser

if TYPE_CHECKING:
    from duoka.recipes.common.recipe_run import RecipeRun


def command_parser(name: str, summary: str = "", **options: Any) -> ArgumentParser:
    """Return a parser for the subcommand ``name``, without arguments yet."""
    summary = summary or COMMANDS[name]
    return ArgumentParser(f"duoka {name}", f"{summary[0].upper()}{summary[1:]}.", **options)


def add_device(parser: ArgumentParser, help_text: str, default: str | None = "auto") -> None:
    """Add ``--device``, also under its second name."""
    parser.add_argument("--device", "--devices", default=default, metavar="SPEC", help=help_text)


def add_json(parser: ArgumentParser, note: str = "") -> None:
    """Add ``--json``."""
    parser.add_argument("--json", action="store_true", help=f"print JSON, for programs{note}")


def add_run(parser: ArgumentParser, *, device: str | None = None, root: bool = True) -> None:
    """Add RUN, ``--device`` and ``--root``; a default of ``None`` is the run's own value."""
    parser.add_argument("run", metavar="RUN", help="folder of the run, as `duoka train` has printed it")
    default = device or "the run's own"
    add_device(parser, f"devices to compute on (default: {default})", device)
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
