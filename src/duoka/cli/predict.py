"""``duoka predict RUN INPUT...`` and ``RUN --from FILE.csv``: what the model of a finished run makes of new inputs."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from duoka.cli.console import console, print_json
from duoka.errors import ConfigError

if TYPE_CHECKING:
    from duoka.recipes.common.recipe_run import RecipeRun
    from duoka.recipes.common.registry import Prediction, Recipe

__all__ = ["SUMMARY", "run"]

SUMMARY = "predict with a finished run"


def run(argv: Sequence[str]) -> int:
    """Print the predictions for the inputs that ``argv`` names; return the exit status."""
    options = _parser().parse_args(argv)
    from duoka.recipes.common import registry
    from duoka.recipes.common.config import of_run
    from duoka.recipes.common.recipe_run import RecipeRun

    finished = RecipeRun.at(options.run)
    recipe = registry.find(finished.recipe())
    config = dataclasses.replace(of_run(recipe.Config, finished), device=options.device)
    if options.fill is not None and options.table is None:
        raise ConfigError("--fill is for a table: give one with --from data.csv")
    if options.table is not None:
        return _write(recipe, finished, config, options)
    if not options.inputs:
        raise ConfigError("nothing to predict: name images after the run, or a table with --from data.csv")
    predictions = recipe.predict(finished, config, options.inputs, invert=options.invert)
    if options.json:
        print_json([_as_json(prediction, options.top) for prediction in predictions])
        return 0
    out = console()
    for prediction in predictions:
        answers = ", ".join(f"{name} {probability:.1%}" for name, probability in prediction.ranked[: options.top])
        out.print(f"{prediction.source}: {answers}", soft_wrap=True)
    return 0


def _write(recipe: Recipe, finished: RecipeRun, config: Any, options: argparse.Namespace) -> int:
    """Let a recipe that predicts from tables write its answer, and say where it is."""
    if options.inputs:
        raise ConfigError(f"--from takes the only input; {options.inputs[0]!r} is one too many")
    if not hasattr(recipe, "predict_table"):
        if hasattr(recipe, "recommend"):
            recipe.predict(finished, config, [])  # says what its runs answer instead
        raise ConfigError(f"a run of `{finished.recipe()}` predicts from images, not from a table: leave --from out")
    if options.fill is not None:
        config = dataclasses.replace(config, fill=options.fill == "true")
    written = recipe.predict_table(finished, config, options.table)
    if options.json:
        print_json({"input": options.table, "files": [str(path) for path in written.files], "summary": written.summary})
        return 0
    out = console()
    out.print(f"{options.table}: {written.summary}", soft_wrap=True)
    for path in written.files:
        out.print(f"wrote {path}", soft_wrap=True)
    return 0


def _as_json(prediction: Prediction, top: int) -> dict[str, object]:
    (best, probability), *_ = prediction.ranked
    ranked = [{"class": name, "probability": value} for name, value in prediction.ranked[:top]]
    return {"input": prediction.source, "class": best, "probability": probability, "top": ranked}


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} has to be a whole number, 1 or more")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("duoka predict", description=f"{SUMMARY[0].upper()}{SUMMARY[1:]}.")
    parser.add_argument("run", metavar="RUN", help="the run's folder, which `duoka train` has named")
    parser.add_argument("inputs", metavar="IMAGE", nargs="*", help="an image of any size and kind, grey or colour")
    parser.add_argument("--from", dest="table", metavar="FILE.csv", help="a table, for a run of the recipe informer")
    parser.add_argument(
        "--fill",
        nargs="?",
        const="true",
        choices=("true", "false"),
        help="interpolate what is missing in the table, or refuse it (default: as the run did)",
    )
    parser.add_argument("--device", default="auto", metavar="SPEC", help="what to compute on (default: %(default)s)")
    parser.add_argument(
        "--top", type=_count, default=3, metavar="N", help="how many answers to show (default: %(default)s)"
    )
    parser.add_argument("--invert", action="store_true", help="swap dark and light: for a dark digit on white paper")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    return parser
