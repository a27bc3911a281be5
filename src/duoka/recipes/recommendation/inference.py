"""What a finished run recommends to a user, and why."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import normalize

from duoka import devices, load
from duoka.errors import ConfigError, DataError
from duoka.recipes.common.recipe_run import RecipeRun
from duoka.recipes.datasets.movielens import ML1MDataset
from duoka.recipes.datasets.movielens_split import PARTS
from duoka.recipes.models.recommender import Recommender
from duoka.recipes.recommendation.config import RecommendationConfig
from duoka.recipes.recommendation.training import build, prepared

__all__ = ["RecommendationList", "Recommendation", "data_of", "model_of", "recommend", "refuse_other_data"]

USER_FIELDS, FILM_FIELDS = ("id", "gender", "age", "occupation"), ("id", "genres", "title")
SIMILAR = 3
"""How many films that the user knows are named beside a recommendation."""


@dataclass(frozen=True)
class Recommendation:
    """A film, and why it is recommended."""

    film: int
    """The number in ``movies.dat``."""
    title: str
    genres: tuple[str, ...]
    score: float
    weights: dict[str, float]
    """How much the id and each part of the description weigh in what the model knows of the film, in all 1; empty where
    the model does not weigh them."""
    similar: tuple[tuple[str, float], ...]
    """Films that the user has rated and that the model holds for the most alike, and the cosine of both."""


@dataclass(frozen=True)
class RecommendationList:
    """Recommendations for a user."""

    user: int
    """The number in ``users.dat``."""
    description: str
    known: int
    """How many films the user has rated; none of them is recommended."""
    weights: dict[str, float]
    """As a film's, of the user."""
    films: tuple[Recommendation, ...]


def data_of(config: RecommendationConfig, run: RecipeRun | None = None) -> ML1MDataset:
    """Return the set that ``config`` names; where it is for a ``run`` that has begun, its folder must be there.

    Raises:
        DataError: there is none; of a run's, which may have been any set, MovieLens-1M is not made in its place.

    """
    if run is not None and not Path(config.root).exists():
        raise DataError(
            f"{config.root} is not there, where the run {run.folder} had its data: give their folder with --root"
        )
    return ML1MDataset(config.root, config.ratio, config.split, config.split_seed, download=config.download)


def refuse_other_data(run: RecipeRun, data: ML1MDataset, before: dict[str, Any], *, ratings: bool) -> None:
    """Refuse a set that is not that of ``run``: other users or films, or, where ``ratings`` matter, others in its parts.

    Args:
        run: a run that has begun.
        data: the set as it is.
        before: the ``facts`` of the set of then.
        ratings: whether they have to be the same: a rating more, and others would be for training and for the test.

    Raises:
        DataError: it is another one.

    """
    now, counted, remedy = data.metadata(), ("users", "films"), "give the set of then with --root"
    for key in (*counted, *PARTS) if ratings else counted:
        if before[key] != now[key]:
            what = key if key in counted else f"ratings in its {key} part"
            then = f"the run {run.folder} was trained on {before[key]:,}"
            raise DataError(f"{data.folder} has {now[key]:,} {what}, and {then}: {remedy}")
    for key, what in (("entities", "users or films"), ("parts", "ratings"))[: 1 + ratings]:
        if before.get(key, now[key]) != now[key]:
            raise DataError(
                f"{data.folder} has other {what} than those that the run {run.folder} was trained on: {remedy}"
            )


def model_of(run: RecipeRun, config: RecommendationConfig, data: ML1MDataset) -> Recommender:
    """Return the model of a finished run, on the first device.

    Raises:
        DataError: the run is not finished, or was trained on another set.

    """
    path, remembered = run.finished_model(), run.read_results("stage", "data")
    refuse_other_data(run, data, remembered["data"], ratings=False)
    try:
        texts = prepared(config, data)
    except ConfigError as error:
        raise ConfigError(f"{error} (the run's GPT-2 is named by `pretrained` in {run.config})") from error
    model = build(config, data, texts, remembered["stage"])
    load(path, into=model)
    return model.to(devices.resolve(config.device).devices[0]).eval()


def recommend(run: RecipeRun, config: RecommendationConfig, user: int, k: int) -> RecommendationList:
    """Return the ``k`` best films for the user with the number ``user`` in ``users.dat``; fewer where there are no more.

    Raises:
        ConfigError: ``k`` is less than 1.
        DataError: there is no such user, or no such run.

    """
    if k < 1:
        raise ConfigError(f"k is {k}: ask for 1 film or more")
    data = data_of(config, run)
    place = data.user_index(user)
    model = model_of(run, config, data)
    known = data.seen(*PARTS).items_of(place)
    scorer = model.scorer()
    films, scores = model.recommend(place, k, known.tolist(), scorer)
    likeness = _likeness(scorer.items.product.cpu(), films, torch.from_numpy(known))
    weights = _weights(model, FILM_FIELDS, items=films)
    found = []
    for row, (film, score) in enumerate(zip(films.tolist(), scores.tolist(), strict=True)):
        best = likeness[row].topk(min(SIMILAR, len(known)))
        similar = tuple(
            (data.titles[known[at]], value)
            for at, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        )
        line = data.films[film]
        found.append(Recommendation(line.id, line.title, line.genres, score, weights[row], similar))
    about = data.user_texts[place].replace("\n", ", ")
    own = _weights(model, USER_FIELDS, users=torch.tensor([place]))[0]
    return RecommendationList(user, about, len(known), own, tuple(found))


def _likeness(vectors: torch.Tensor, films: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Return the cosines of ``films`` with ``known`` ones, ``(films, known)``, of the vectors of all."""
    vectors = normalize(vectors)
    return vectors[films] @ vectors[known].T


def _weights(model: Any, names: tuple[str, ...], **wanted: torch.Tensor) -> list[dict[str, float]]:
    """Return how much the id and each field weigh in each of ``wanted``."""
    try:
        weights = model.attention(**wanted).tolist()
    except (AttributeError, ConfigError):  # a model without attention
        return [{} for some in wanted.values() for _ in some]
    return [dict(zip(names, row, strict=True)) for row in weights]
