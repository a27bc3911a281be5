"""The two stages of the recipe ``movielens``: their options."""

from types import SimpleNamespace

import pytest

from duoka.recipes.common.recipe_run import RecipeRun
from duoka.recipes.recommendation import RecommendationConfig

pytest.importorskip("transformers")
pytest.importorskip("peft")


def test_each_stage_gets_the_time_that_is_left_when_it_begins(tmp_path, monkeypatch):
    from duoka.recipes.recommendation import training

    left, given = iter([3.0, 1.0]), []

    def trainer(*_, max_hours, **options):
        given.append(max_hours)
        return SimpleNamespace(history=[])

    monkeypatch.setattr("duoka.recipes.common.recipe_run._hours_left", lambda _: next(left))
    for name in ("load_texts", "build_model", "copy_stage1_weights"):
        monkeypatch.setattr(training, name, lambda *_: SimpleNamespace())
    monkeypatch.setattr(training, "_trainer", trainer)
    monkeypatch.setattr(training, "fit", lambda *_, **options: ({}, None))
    config = RecommendationConfig(root=str(tmp_path), device="cpu", hours=4.0)
    training.train_stages(config, SimpleNamespace(metadata=dict), RecipeRun(tmp_path))
    assert given == [3.0, 1.0]
