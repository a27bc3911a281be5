"""``duoka predict RUN IMAGE...`` or ``RUN --from FILE.csv``: predictions of a finished run's model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from duoka.cli.arguments import add_json, add_run, command_parser, load_run
from duoka.cli.console import console, print_json
from duoka.errors import ConfigError
from duoka.utils.argument_parser import ArgumentParser
from duoka.utils.validation import check_integer

if TYPE_CHECKING:
    from duoka.recipes.common.recipe_run import RecipeRun
    from duoka.recipes.common.registry import Prediction


def run(argv: Sequence[str]) -> int:
    """Print the predictions for the inputs that ``argv`` names; return the exit status."""
    options = parser().parse(argv)
    check_integer("--top", options.top, 1)
    finished, recipe, config = load_run(options)
    if options.fill is not None and options.table is None:
        raise ConfigError("--fill is for a table: give one with --from data.csv")
    if options.table is not None:
        return _predict_table(recipe, finished, config, options)
    if not options.inputs:
        raise ConfigError("nothing to predict: name images after the run, or a table with --from data.csv")
    predictions = recipe.predict(finished, config, options.inputs, invert=options.invert)
    if options.json:
        print_json([_as_json(prediction, options.top) for prediction in predictions])
        return 0
    for prediction in predictions:
        answers = ", ".join(f"{name} {probability:.1%}" for name, probability in prediction.ranked[: options.top])
        console().print(f"{prediction.source}: {answers}")
    return 0


def parser() -> ArgumentParser:
    """Return the command's parser."""
    parser = command_parser("predict")
    add_run(parser, device="auto", root=False)
    text = "an image of any size and kind, grey or color"
    parser.add_argument("inputs", metavar="IMAGE", nargs="*", default=[], help=text)
    text = "a table, for a run of the recipe informer"
    parser.add_argument("--from", dest="table", default=None, metavar="FILE.csv", help=text)
    text = "interpolate missing values of the table, or refuse them (default: the run's own)"
    parser.add_argument("--fill", type=bool, nargs="?", const=True, default=None, metavar="true|false", help=text)
    parser.add_argument("--top", type=int, default=3, metavar="N", help="number of answers (default: %(default)s)")
    parser.add_argument("--invert", action="store_true", help="swap dark and light: for a dark digit on white paper")
    add_json(parser)
    return parser


def _predict_table(recipe: Any, finished: RecipeRun, config: Any, options: Namespace) -> int:
    """Have a recipe write its predictions for a table, and print where they are."""
    if options.inputs:
        raise ConfigError(f"--from takes the only input; {options.inputs[0]!r} is one too many")
    if not hasattr(recipe, "predict_table"):
        if hasattr(recipe, "recommend"):
            recipe.predict(finished, config, [])  # raises: its runs recommend instead
        raise ConfigError(f"a run of `{finished.recipe()}` predicts from images, not from a table: leave --from out")
    if options.fill is not None:
        config = dataclasses.replace(config, fill=options.fill)
    written = recipe.predict_table(finished, config, options.table)
    if options.json:
        print_json({"input": options.table, "files": [str(path) for path in written.files], "summary": written.summary})
        return 0
    console().print("\n".join((f"{options.table}: {written.summary}", *(f"wrote {path}" for path in written.files))))
    return 0


def _as_json(prediction: Prediction, top: int) -> dict[str, object]:
    (best, probability), *_ = prediction.ranked
    ranked = [{"class": name, "probability": value} for name, value in prediction.ranked[:top]]
    return {"input": prediction.source, "class": best, "probability": probability, "top": ranked}
