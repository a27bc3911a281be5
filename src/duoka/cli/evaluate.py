"""``duoka eval RUN``: test the model of a finished run again."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from duoka.cli.train import show

__all__ = ["SUMMARY", "run"]

SUMMARY = "evaluate a finished run"


def run(argv: Sequence[str]) -> int:
    """Evaluate the run that ``argv`` names and print its numbers; return the exit status."""
    options = _parser().parse_args(argv)
    from duoka.recipes.common import registry
    from duoka.recipes.common.config import of_run
    from duoka.recipes.common.recipe_run import RecipeRun

    finished = RecipeRun.at(options.run)
    recipe = registry.find(finished.recipe())
    config = of_run(recipe.Config, finished)
    changed = {key: value for key in ("device", "root") if (value := getattr(options, key)) is not None}
    if "root" in changed and getattr(config, "csv", None):
        changed["csv"] = str(Path(options.root) / Path(config.csv).name)  # the run's file, moved there
    show(recipe.evaluate(finished, dataclasses.replace(config, **changed)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("duoka eval", description=f"{SUMMARY[0].upper()}{SUMMARY[1:]}.")
    parser.add_argument("run", metavar="RUN", help="the run's folder, which `duoka train` has named")
    parser.add_argument("--device", metavar="SPEC", help="what to compute on (default: what the run was trained on)")
    parser.add_argument("--root", metavar="DIR", help="the folder of the data (default: where it was in training)")
    return parser
