"""``duoka train RECIPE``: train a recipe, and say what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from duoka.cli.console import console

if TYPE_CHECKING:
    from duoka.recipes.common.registry import RecipeOutcome

__all__ = ["SUMMARY", "run"]

SUMMARY = "train a recipe on every device"


def run(argv: Sequence[str]) -> int:
    """Train the recipe that ``argv`` names first, with the options that follow; return the exit status."""
    from duoka.recipes.common import registry
    from duoka.recipes.common.config import read
    from duoka.recipes.common.recipe_run import no_empty_folder

    if not argv or argv[0] in ("-h", "--help"):
        console().print(_recipes())
        return 0
    name, *options = argv
    recipe = registry.find(name)
    with no_empty_folder():
        outcome = recipe.train(read(recipe.Config, options, recipe=name))
    show(outcome)
    return 0


def show(outcome: RecipeOutcome) -> None:
    """Print what a training or an evaluation came to, once for all ranks of a job."""
    from duoka import current_world

    if not current_world().is_main:
        return
    out = console()
    for name, value in outcome.results.items():
        out.print(f"{name.replace('_', ' ')}: {_brief(value)}")
    out.print(f"run folder: {outcome.run.folder}", soft_wrap=True)
    out.print(f"next: {outcome.next_step}", soft_wrap=True)


def _brief(value: float) -> str:
    """Return a number with four decimals, or four digits where these would show nothing of it."""
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e9 else f"{value:.4g}"


def _recipes() -> str:
    """Return the list of recipes."""
    from duoka.recipes.common.registry import RECIPES

    width = max(map(len, RECIPES))
    lines = [f"  {name:{width}}  {entry.summary}" for name, entry in RECIPES.items()]
    example = next(iter(RECIPES))
    return "\n".join(
        (
            "usage: duoka train RECIPE [-c FILE.yml] [--KEY VALUE] ...",
            "       duoka train RECIPE --resume RUN",
            "",
            "recipes:",
            *lines,
            "",
            f"`duoka train {example} --help` explains every option; this one needs no download:",
            f"  duoka train {example} --dataset digits --device cpu:2",
        )
    )
