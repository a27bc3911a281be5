"""Recipe ``movielens``: film recommendations from ratings and from a GPT-2's vectors of texts.

`training` trains, `ranking_metrics` measures, `baselines` has the recommenders to compare with,
`results` writes the files of a run, and `inference` recommends films with a finished run. The data
are in `recipes.datasets.movielens`, the models in `recipes.models.recommender` and `gpt2_recommender`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from duoka import current_world, devices, save
from duoka.errors import ConfigError
from duoka.recipes.common.config import config_of_run
from duoka.recipes.common.recipe_run import RecipeRun, recipe_run, refuse_other_data
from duoka.recipes.common.registry import Prediction, RecipeOutcome
from duoka.recipes.datasets.movielens import ML1MDataset
from duoka.recipes.recommendation import training
from duoka.recipes.recommendation.baselines import ItemKNN, Popularity
from duoka.recipes.recommendation.config import NAME, RecommendationConfig
from duoka.recipes.recommendation.inference import load_data, load_model, recommend
from duoka.recipes.recommendation.results import MetricTable, draw_comparison, format_table, headline
from duoka.recipes.recommendation.training import StageResult
from duoka.utils.text import duoka_command

__all__ = ["RecommendationConfig", "evaluate", "predict", "recommend", "train"]

Config = RecommendationConfig
"""The name under which the registry finds every recipe's options."""


def train(config: RecommendationConfig) -> RecipeOutcome:
    """Train both stages, test, and write the results into the run's folder."""
    config = config.resolved()
    devices.resolve(config.device)  # reports a missing device before any download
    _check_stage1_options(config)
    data = load_data(config, RecipeRun.at(config.resume) if config.resume else None)
    with recipe_run(NAME, config, data.metadata(), f"--root {data.folder}") as run:
        stages = training.train_stages(config, data, run)
        best = max(stages, key=lambda stage: stage.validation[training.BEST_METRIC])
        table = _test(config, data, stages, best)
        if current_world().is_main:
            save(best.model, run.model)
            _write_results(run, data, stages, best, table)
    return RecipeOutcome(run, headline(table), _next_step(run, data))


def evaluate(run: RecipeRun, config: RecommendationConfig) -> RecipeOutcome:
    """Test the model of a finished run again, and write ``evaluation.json`` into its folder."""
    config = config.resolved()
    run.finished_model()  # raises for an unfinished run
    data = load_data(config, run)
    refuse_other_data(run, data.metadata(), f"--root {data.folder}")
    evaluator = training.evaluator_of(config, data, "test")
    metrics = training.evaluate_model(load_model(run, config, data), evaluator, config)
    run.write_results({"test": metrics}, "evaluation.json")
    return RecipeOutcome(run, {f"test_{name}": value for name, value in metrics.items()}, _next_step(run, data))


def predict(run: RecipeRun, *_: Any, **__: bool) -> list[Prediction]:
    """Raise ``ConfigError``: this recipe has ``recommend`` instead."""
    raise ConfigError(f"a run of {NAME} recommends films to a user: duoka recommend {run.folder} --user NUMBER")


def _check_stage1_options(config: RecommendationConfig) -> None:
    """Refuse to change stage 1 of a run whose stage 2 started from its result."""
    if not config.resume or not Path(config.resume, "stage-2", "checkpoint").is_dir():
        return
    run = RecipeRun.at(config.resume)
    original = config_of_run(RecommendationConfig, run)
    for option in ("epochs", "patience", "eval_every_epochs"):
        before, now = getattr(original, option), getattr(config, option)
        new_run = duoka_command("train", NAME, "-c", run.config, f"--{option}", now)
        if before != now:
            raise ConfigError(
                f"{option}={now} is not valid: it was {before} in this run, whose stage 2 has started from stage 1's result; "
                f"leave out --{option} to resume, or start a new run: {new_run}"
            )


def _test(
    config: RecommendationConfig, data: ML1MDataset, stages: Sequence[StageResult], best: StageResult
) -> MetricTable:
    """Return the test metrics of the run's model, of its other stage, and of the baselines."""
    evaluator = training.evaluator_of(config, data, "test")
    models = {f"{config.model} (stage {stage.number})": stage.model for stage in (best, *stages)}
    table = {name: training.evaluate_model(model, evaluator, config) for name, model in models.items()}
    if config.baselines:
        for name, kind in (("popularity", Popularity), ("itemknn", ItemKNN)):
            table[name] = training.evaluate_model(kind(evaluator.seen, data.n_items), evaluator, config)
        if config.model != "ncf":
            table["ncf"] = training.evaluate_model(training.train_ncf(config, data), evaluator, config)
    return table


def _write_results(
    run: RecipeRun, data: ML1MDataset, stages: Sequence[StageResult], best: StageResult, table: MetricTable
) -> None:
    metadata = data.metadata()
    results: dict[str, Any] = {
        "recipe": NAME,
        **headline(table),
        "stage": best.number,
        "test": table,
        "validation": {f"stage {stage.number}": stage.validation for stage in stages},
        "epochs": {f"stage {stage.number}": stage.epochs for stage in stages},
        "data": metadata,
    }
    run.write_results(results)
    title = f"{data.folder.name}: {metadata['users']:,} users, {metadata['films']:,} films, {metadata['test']:,} test ratings"
    text = format_table(title, table)
    run.write_text("evaluation_results.txt", text)
    run.log(text)
    records = [
        {"stage": stage.number, **json.loads(line)}
        for stage in stages
        for line in (run.folder / f"stage-{stage.number}" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    run.write_text("metrics.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    draw_comparison(run.plots / "comparison.png", table)


def _next_step(run: RecipeRun, data: ML1MDataset) -> str:
    return duoka_command("recommend", run.folder, "--user", data.user_ids[0], "-k", 10)
