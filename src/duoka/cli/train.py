"""``duoka train RECIPE``: train a recipe and print its results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from duoka.cli.arguments import command_parser
from duoka.cli.console import console
from duoka.utils.argument_parser import ArgumentParser
from duoka.utils.signals import StopSignals
from duoka.utils.text import duoka_command

if TYPE_CHECKING:
    from duoka.recipes.common.registry import RecipeOutcome


def run(argv: Sequence[str]) -> int:
    """Train the recipe that ``argv`` names first, with the options that follow; return the exit status."""
    from duoka.recipes.common.config import read_config
    from duoka.recipes.common.registry import find_recipe

    if not argv or argv[0] in ("-h", "--help"):
        console().print(_recipes())
        return 0
    name, *options = argv
    recipe = find_recipe(name)
    with StopSignals():
        print_outcome(recipe.train(read_config(recipe.Config, options, recipe=name)))
    return 0


def parser() -> ArgumentParser:
    """Return the command's parser, for shell completion; ``run`` builds the parser of one recipe."""
    return command_parser("train")


def add_subcommands(parser: ArgumentParser) -> None:
    """Add every recipe to the command's parser."""
    from duoka.recipes.common.config import recipe_parser
    from duoka.recipes.common.registry import RECIPES, find_recipe

    recipes = parser.add_subcommands(metavar="RECIPE")
    for name, entry in RECIPES.items():
        recipes.add_subcommand(name, recipe_parser.__wrapped__(find_recipe(name).Config, name), help=entry.summary)


def print_outcome(outcome: RecipeOutcome) -> None:
    """Print the results of a training or an evaluation, on rank 0."""
    from duoka import current_world

    if not current_world().is_main:
        return
    out = console()
    for name, value in outcome.results.items():
        out.print(f"{name.replace('_', ' ')}: {_format_number(value)}")
    out.print(f"run folder: {outcome.run.folder}")
    out.print(f"next: {outcome.next_step}")


def _format_number(value: float) -> str:
    """Return a number with four decimals, or with four digits if decimals would show nothing of it."""
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e9 else f"{value:.4g}"


def _recipes() -> str:
    from duoka.recipes.common.registry import RECIPES

    width, example = max(map(len, RECIPES)), next(iter(RECIPES))
    recipes = "\n".join(f"  {name:{width}}  {entry.summary}" for name, entry in RECIPES.items())
    return (
        "usage: duoka train RECIPE [-c FILE.yml] [--KEY VALUE] ...\n"
        "       duoka train RECIPE --resume RUN\n\n"
        f"recipes:\n{recipes}\n\n"
        f"`duoka train {example} --help` explains every option; this one needs no download:\n"
        f"  {duoka_command('train', example, '--dataset', 'digits', '--device', 'cpu:2')}"
    )
