"""``duoka recommend RUN --user NUMBER -k 10``: films for a user, with titles and reasons."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from duoka.cli.console import console, print_json
from duoka.errors import ConfigError

if TYPE_CHECKING:
    from duoka.recipes.recommendation.inference import RecommendationList

__all__ = ["SUMMARY", "run"]

SUMMARY = "recommend films to a user with a finished run"


def run(argv: Sequence[str]) -> int:
    """Print what the run that ``argv`` names recommends; return the exit status."""
    options = _parser().parse_args(argv)
    from duoka.recipes.common import registry
    from duoka.recipes.common.config import of_run
    from duoka.recipes.common.recipe_run import RecipeRun

    finished = RecipeRun.at(options.run)
    recipe: Any = registry.find(finished.recipe())
    if not hasattr(recipe, "recommend"):
        raise ConfigError(f"a run of `{finished.recipe()}` recommends nothing; give a run of the recipe movielens")
    changed = {key: value for key in ("device", "root") if (value := getattr(options, key)) is not None}
    config = dataclasses.replace(of_run(recipe.Config, finished), **changed)
    answer = recipe.recommend(finished, config, options.user, options.k)
    if options.json:
        print_json(dataclasses.asdict(answer))
    else:
        _show(answer)
    return 0


def _show(answer: RecommendationList) -> None:
    out = console()
    out.print(f"user {answer.user}: {answer.description}; has rated {answer.known:,} films", soft_wrap=True)
    if answer.weights:
        out.print(f"   the model goes by {_shares(answer.weights)} of the user", soft_wrap=True)
    if not answer.films:
        out.print("there is no film that the user has not rated")
    for place, film in enumerate(answer.films, 1):
        out.print(f"{place:2}. {film.title}, {', '.join(film.genres)}: score {film.score:.3f}", soft_wrap=True)
        reasons = [f"by {_shares(film.weights)}"] if film.weights else []
        if film.similar:
            reasons.append("like " + ", ".join(f"{title} ({value:.2f})" for title, value in film.similar))
        if reasons:
            out.print(f"    {'; '.join(reasons)}", soft_wrap=True)


def _shares(weights: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.0%}" for name, value in weights.items())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("duoka recommend", description=f"{SUMMARY[0].upper()}{SUMMARY[1:]}.")
    parser.add_argument("run", metavar="RUN", help="the run's folder, which `duoka train movielens` has named")
    parser.add_argument("--user", type=int, required=True, metavar="NUMBER", help="the user's number in users.dat")
    parser.add_argument("-k", type=int, default=10, metavar="N", help="how many films (default: %(default)s)")
    parser.add_argument("--device", metavar="SPEC", help="what to compute on (default: what the run was trained on)")
    parser.add_argument("--root", metavar="DIR", help="the folder of the data (default: where it was in training)")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    return parser
