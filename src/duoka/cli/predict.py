"""``duoka predict RUN INPUT...``: what the model of a finished run makes of new inputs."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from duoka.cli.console import console, print_json

if TYPE_CHECKING:
    from duoka.recipes.registry import Prediction

__all__ = ["SUMMARY", "run"]

SUMMARY = "predict with a finished run"


def run(argv: Sequence[str]) -> int:
    """Print the predictions for the inputs that ``argv`` names; return the exit status."""
    options = _parser().parse_args(argv)
    from duoka.recipes import registry
    from duoka.recipes.config import of_run
    from duoka.recipes.runs import Run

    finished = Run.at(options.run)
    recipe = registry.find(finished.recipe())
    config = dataclasses.replace(of_run(recipe.Config, finished), device=options.device)
    predictions = recipe.predict(finished, config, options.inputs, invert=options.invert)
    if options.json:
        print_json([_as_json(prediction, options.top) for prediction in predictions])
        return 0
    out = console()
    for prediction in predictions:
        answers = ", ".join(f"{name} {probability:.1%}" for name, probability in prediction.ranked[: options.top])
        out.print(f"{prediction.source}: {answers}", soft_wrap=True)
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
    parser.add_argument("inputs", metavar="IMAGE", nargs="+", help="an image of any size and kind, grey or colour")
    parser.add_argument("--device", default="auto", metavar="SPEC", help="what to compute on (default: %(default)s)")
    parser.add_argument(
        "--top", type=_count, default=3, metavar="N", help="how many answers to show (default: %(default)s)"
    )
    parser.add_argument("--invert", action="store_true", help="swap dark and light: for a dark digit on white paper")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    return parser
