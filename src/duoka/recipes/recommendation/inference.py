"""Recommendations of a finished run for one user, with reasons."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from torch.nn.functional import normalize

from duoka import load
from duoka.errors import ConfigError, DataError
from duoka.recipes.common.recipe_run import RecipeRun, refuse_other_data
from duoka.recipes.datasets.movielens import PARTS, ML1MDataset
from duoka.recipes.models.recommender import Recommender
from duoka.recipes.recommendation.config import RecommendationConfig
from duoka.recipes.recommendation.training import build_model, first_device, load_texts
from duoka.utils.validation import check_integer

USER_FIELDS, FILM_FIELDS = ("id", "gender", "age", "occupation"), ("id", "genres", "title")
NUM_SIMILAR = 3
"""Number of the user's films that a recommendation names as similar."""


@dataclass(frozen=True)
class Recommendation:
    """A film, and why it is recommended."""

    film: int
    """The number in ``movies.dat``."""
    title: str
    genres: tuple[str, ...]
    score: float
    weights: dict[str, float]
    """Attention weights of the film's id and text fields; they sum to 1. Empty for a model without attention."""
    similar: tuple[tuple[str, float], ...]
    """The most similar films that the user has rated, and the cosine of both vectors."""


@dataclass(frozen=True)
class RecommendationList:
    """Recommendations for a user."""

    user: int
    """The number in ``users.dat``."""
    description: str
    known: int
    """Number of films that the user has rated; none of them is recommended."""
    weights: dict[str, float]
    """Attention weights of the user's id and text fields."""
    films: tuple[Recommendation, ...]


class _SavedStage(TypedDict):
    """What recommendations read of ``results.json``."""

    stage: Literal[1, 2]


def load_data(config: RecommendationConfig, run: RecipeRun | None) -> ML1MDataset:
    """Return the data set of ``config``.

    For an existing ``run`` its folder must exist: the run's data may be any set, so MovieLens-1M is not
    downloaded in its place.
    """
    if run is not None and not Path(config.root).exists():
        raise DataError(
            f"root={config.root}, the data folder of the run {run.folder}, does not exist: pass it as --root"
        )
    return ML1MDataset(config.root, config.ratio, config.split, config.split_seed, download=config.download)


def load_model(run: RecipeRun, config: RecommendationConfig, data: ML1MDataset) -> Recommender:
    """Return the model of a finished run, on the first device.

    Raises DataError if the run is not finished, or was trained on other users or films.
    """
    path, metadata = run.finished_model(), data.metadata()
    refuse_other_data(run, {key: metadata[key] for key in ("users", "films", "entities")}, f"--root {data.folder}")
    try:
        texts = load_texts(config, data)
    except ConfigError as error:
        raise ConfigError(f"{error} (option `pretrained` in {run.config})") from error
    model = build_model(config, data, texts, run.read_results(_SavedStage)["stage"])
    load(path, into=model)
    return model.to(first_device(config)).eval()


def recommend(run: RecipeRun, config: RecommendationConfig, user: int, k: int) -> RecommendationList:
    """Return the best ``k`` films for the user with the number ``user`` in ``users.dat``; fewer if fewer are left."""
    check_integer("k", k, 1)
    config = config.resolved()
    data = load_data(config, run)
    index = data.user_index(user)
    model = load_model(run, config, data)
    seen = data.seen(*PARTS).items_of(index)
    scorer = model.scorer()
    items, scores = model.recommend(index, k, seen.tolist(), scorer)
    vectors = normalize(scorer.items.dot.cpu())
    best = (vectors[items] @ vectors[seen].T).topk(min(NUM_SIMILAR, len(seen)))
    weights = _attention_weights(model, FILM_FIELDS, items=items)
    films = []
    for row, (item, score) in enumerate(zip(items.tolist(), scores.tolist(), strict=True)):
        titles = [data.titles[at] for at in seen[best.indices[row]].tolist()]
        similar = tuple(zip(titles, best.values[row].tolist(), strict=True))
        film = data.films[item]
        films.append(Recommendation(film.id, film.title, film.genres, score, weights[row], similar))
    description = data.user_texts[index].replace("\n", ", ")
    user_weights = _attention_weights(model, USER_FIELDS, users=torch.tensor([index]))[0]
    return RecommendationList(user, description, len(seen), user_weights, tuple(films))


def _attention_weights(model: Any, names: tuple[str, ...], **ids: torch.Tensor) -> list[dict[str, float]]:
    try:
        return [dict(zip(names, row, strict=True)) for row in model.attention_weights(**ids).tolist()]
    except (AttributeError, ConfigError):  # a model without attention
        return [{} for some in ids.values() for _ in some]
