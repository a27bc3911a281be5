"""``duoka recommend RUN --user NUMBER -k 10``: films for a user, with titles and reasons."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from duoka.cli.arguments import add_json, add_run, command_parser, load_run
from duoka.cli.console import console, print_json
from duoka.errors import ConfigError
from duoka.utils.argument_parser import ArgumentParser

if TYPE_CHECKING:
    from duoka.recipes.recommendation.inference import RecommendationList


def run(argv: Sequence[str]) -> int:
    """Print what the run that ``argv`` names recommends; return the exit status."""
    options = parser().parse(argv)
    finished, recipe, config = load_run(options)
    if not hasattr(recipe, "recommend"):
        raise ConfigError(f"a run of `{finished.recipe()}` recommends nothing; give a run of the recipe movielens")
    answer = recipe.recommend(finished, config, options.user, options.k)
    if options.json:
        print_json(dataclasses.asdict(answer))
    else:
        _print(answer)
    return 0


def parser() -> ArgumentParser:
    """Return the command's parser."""
    parser = command_parser("recommend")
    add_run(parser)
    parser.add_argument("--user", type=int, required=True, metavar="NUMBER", help="the user's number in users.dat")
    parser.add_argument("-k", type=int, default=10, metavar="N", help="number of films (default: %(default)s)")
    add_json(parser)
    return parser


def _print(answer: RecommendationList) -> None:
    out = console()
    out.print(f"user {answer.user}: {answer.description}; has rated {answer.known:,} films")
    if answer.weights:
        out.print(f"   the model goes by {_shares(answer.weights)} of the user")
    if not answer.films:
        out.print("there is no film that the user has not rated")
    for rank, film in enumerate(answer.films, 1):
        out.print(f"{rank:2}. {film.title}, {', '.join(film.genres)}: score {film.score:.3f}")
        reasons = [f"by {_shares(film.weights)}"] if film.weights else []
        if film.similar:
            reasons.append("like " + ", ".join(f"{title} ({value:.2f})" for title, value in film.similar))
        if reasons:
            out.print(f"    {'; '.join(reasons)}")


def _shares(weights: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.0%}" for name, value in weights.items())
