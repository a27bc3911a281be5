"""Recipe ``movielens``: films for people, by what they have seen and by what a GPT-2 reads of both.

`options` has the options, `stages` the training, `ranking` the measures, `baselines` what a recommender has to beat, `report`
the files that a run leaves, `asking` what a finished run recommends. The data are in `recipes.sets.movielens`, the models
in `recipes.nets.recommender` and `recipes.nets.gpt2_recommender`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from duoka import current_world, devices, launch, save
from duoka.errors import ConfigError
from duoka.recipes.common.config import of_run
from duoka.recipes.common.recipe_run import DATA, RecipeRun
from duoka.recipes.common.registry import Prediction, RecipeOutcome
from duoka.recipes.datasets.movielens import ML1MDataset
from duoka.recipes.recommendation import inference
from duoka.recipes.recommendation import results as report
from duoka.recipes.recommendation.baselines import ItemKNN, Popularity
from duoka.recipes.recommendation.config import NAME, RecommendationConfig
from duoka.recipes.recommendation.inference import RecommendationList
from duoka.recipes.recommendation.ranking_metrics import RankingEvaluator
from duoka.recipes.recommendation.training import BEST, Stage, measured, train_ncf, train_stages

__all__ = ["RecommendationConfig", "evaluate", "predict", "recommend", "train"]

Config = RecommendationConfig
"""What the registry asks every recipe for."""


def train(config: RecommendationConfig) -> RecipeOutcome:
    """Train both stages, test, and write the run's folder with its results and pictures."""
    config = config.resolved()
    devices.resolve(config.device)  # a device that is not there is said before any download
    _refuse_longer_first_stage(config)
    data = _data(config)
    run = launch(_folder_on_main, config, devices=config.device)
    assert run is not None  # rank 0 has made it
    with run.resumable(NAME):
        stages = train_stages(config, data, run)
        best = max(stages, key=lambda stage: stage.validation[BEST])
        table = _table(config, data, stages, best)
        if current_world().is_main:
            save(best.model, run.model)
            _write(run, data, stages, best, table)
    return RecipeOutcome(run, report.headline(table), _next_step(run, data))


def evaluate(run: RecipeRun, config: RecommendationConfig) -> RecipeOutcome:
    """Test the model of a finished run again; writes ``evaluation.json`` into its folder."""
    config = config.resolved()
    data = inference.data_of(config, run)
    run.finished_model()  # or it is said that the run is not
    inference.refuse_other_data(run, data, run.read_results("data")["data"], ratings=True)
    found = measured(inference.model_of(run, config, data), _task(config, data), config)
    if current_world().is_main:
        run.write_results({"test": found}, "evaluation.json")
    return RecipeOutcome(run, {f"test_{name}": value for name, value in found.items()}, _next_step(run, data))


def predict(
    run: RecipeRun,
    config: RecommendationConfig,  # noqa: ARG001
    sources: Sequence[str],  # noqa: ARG001
    *,
    invert: bool = False,  # noqa: ARG001
) -> list[Prediction]:
    """Refuse: this recipe's answers are lists of films, which ``recommend`` makes."""
    raise ConfigError(f"a run of movielens recommends films to a user: duoka recommend {run.folder} --user NUMBER")


def recommend(run: RecipeRun, config: RecommendationConfig, user: int, k: int) -> RecommendationList:
    """Return the ``k`` best films that the user with the number ``user`` in ``users.dat`` has not rated, and why."""
    return inference.recommend(run, config.resolved(), user, k)


def _folder_on_main(config: RecommendationConfig) -> RecipeRun | None:
    """Return the run's folder on rank 0, the same for every rank of a job that others started; made if it is new."""
    if not current_world().is_main:
        return None
    return RecipeRun.at(config.resume) if config.resume else RecipeRun.new(config.out, NAME, str(config.name))


def _refuse_longer_first_stage(config: RecommendationConfig) -> None:
    """Refuse to change stage 1 of a run whose stage 2 has begun, as that began with what stage 1 came to."""
    if not config.resume:
        return
    run = RecipeRun.at(config.resume)
    if not (run.folder / "stage-2" / "checkpoint").is_dir():
        return
    started = of_run(RecommendationConfig, run)
    for option in ("epochs", "patience", "eval_every_epochs"):
        before, now = getattr(started, option), getattr(config, option)
        if before != now:
            raise ConfigError(
                f"`{option}` was {before} in this run and is {now} now, but its stage 2 has begun with what stage 1 came to: "
                f"leave --{option} out to go on, or begin a new run: duoka train {NAME} -c {run.config} --{option} {now}"
            )


def _data(config: RecommendationConfig) -> ML1MDataset:
    """Return the set; for a run that goes on, the one that it began with."""
    if not config.resume:
        return inference.data_of(config)
    run = RecipeRun.at(config.resume)
    data = inference.data_of(config, run)
    if (run.folder / DATA).is_file():
        before = json.loads((run.folder / DATA).read_text(encoding="utf-8"))
        inference.refuse_other_data(run, data, before, ratings=True)
    return data


def _task(config: RecommendationConfig, data: ML1MDataset) -> RankingEvaluator:
    return RankingEvaluator.of(data, "test", only_its_films=config.split == "cold-films")


def _table(config: RecommendationConfig, data: ML1MDataset, stages: Sequence[Stage], best: Stage) -> report.Table:
    """Return the test's measures of the run's model, of its other stage, and of the baselines."""
    task = _task(config, data)
    ordered = sorted(stages, key=lambda stage: stage is not best)
    table = {f"{config.model} (stage {stage.number})": measured(stage.model, task, config) for stage in ordered}
    if config.baselines:
        for name, kind in (("popularity", Popularity), ("itemknn", ItemKNN)):
            table[name] = measured(kind(task.seen, data.n_items), task, config)
        if config.model != "ncf":
            table["ncf"] = measured(train_ncf(config, data), task, config)
    return table


def _write(run: RecipeRun, data: ML1MDataset, stages: Sequence[Stage], best: Stage, table: report.Table) -> None:
    """Write numbers and pictures into the run's folder."""
    facts = data.metadata()
    results: dict[str, Any] = {
        "recipe": NAME,
        **report.headline(table),
        "stage": best.number,
        "test": table,
        "validation": {f"stage {stage.number}": stage.validation for stage in stages},
        "epochs": {f"stage {stage.number}": stage.epochs for stage in stages},
        "data": facts,
    }
    run.write_results(results)
    title = f"{data.folder.name}: {facts['users']:,} users, {facts['films']:,} films, {facts['test']:,} test ratings"
    text = report.text(title, table)
    run.write_text("evaluation_results.txt", text)
    run.log(text)
    records = [
        {"stage": stage.number, **json.loads(line)}
        for stage in stages
        for line in (run.folder / f"stage-{stage.number}" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    run.write_text("metrics.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    report.draw(run.plots / "comparison.png", table)


def _next_step(run: RecipeRun, data: ML1MDataset) -> str:
    return f"duoka recommend {run.folder} --user {data.user_ids[0]} -k 10"
