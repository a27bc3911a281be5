"""The recipe ``movielens`` on small synthetic data: its files, recommendations, errors, and equal runs on two devices."""

import json
import math
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from duoka import Callback, Trainer
from duoka.cli.main import main
from duoka.errors import ConfigError
from duoka.recipes.common.config import config_of_run
from duoka.recipes.common.recipe_run import RecipeRun
from duoka.recipes.datasets import negative_sampling, synthetic_movielens
from duoka.recipes.datasets.movielens import ML1MDataset
from duoka.recipes.models.gpt2_recommender import two_lr_groups
from duoka.recipes.recommendation import RecommendationConfig
from duoka.recipes.recommendation.inference import load_model
from duoka.recipes.recommendation.ranking_metrics import METRICS, RankingEvaluator
from duoka.recipes.recommendation.training import RankingModelWithLoss, build_model, load_texts, training_samples
from duoka.recipes.recommendation.user_means import mean_metrics
from support.waiting import wait_until

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = shlex.split(
    "--pretrained none --embedding_size 16 --batch_size 256 --epochs 2 --dynamic_epochs 1 "
    "--lr 0.01 --dynamic_lr 0.003 --text_lr 0.001 --patience 0"
)
ADAMW_ROUNDING = 0.02
"""Difference of scores, in standard deviations, that AdamW may make of rounding."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with data in ``data``, made by the command."""
    folder = tmp_path_factory.mktemp("movielens")
    sizes = ["--users", "60", "--films", "50", "--ratings", "1300", "--seed", "1"]
    assert main(["data", "make", "movielens", "--to", str(folder / "data"), *sizes]) == 0
    return folder


def trained(folder: Path, out: str, *options: str) -> Path:
    given = ["--root", str(folder / "data"), "--out", str(folder / out), *SMALL, *options]
    if "--device" not in options:
        given += ["--device", "cpu"]
    assert main(["train", "movielens", *given]) == 0
    (run,) = (folder / out / "movielens").iterdir()
    return run


@pytest.fixture(scope="module")
def run(folder) -> Path:
    """A finished run with both stages and all baselines."""
    return trained(folder, "first")


@pytest.fixture(scope="module")
def data(folder) -> ML1MDataset:
    return ML1MDataset(folder / "data")


def results(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


def test_a_run_folder_has_all_documented_files(run):
    names = {"config.yml", "metrics.jsonl", "log.txt", "model.safetensors", "results.json", "evaluation_results.txt"}
    names |= {
        f"stage-{stage}/{name}"
        for stage in (1, 2)
        for name in ("checkpoint/last.pt", "metrics.jsonl", "plots/curves.png")
    }
    assert names | {"plots/comparison.png"} <= {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    with Image.open(run / "plots" / "comparison.png") as picture:
        assert min(picture.size) > 200
    assert yaml.safe_load((run / "config.yml").read_text())["recipe"] == "movielens"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(record["stage"], record["epoch"]) for record in records] == [(1, 1), (1, 2), (2, 1)]


def test_the_results_have_both_stages_and_all_baselines(run):
    found = results(run)
    assert set(found["test"]) == {"enhanced (stage 1)", "enhanced (stage 2)", "popularity", "itemknn", "ncf"}
    for metrics in found["test"].values():
        assert set(metrics) == set(METRICS)
        assert all(0 <= value <= 1 for value in metrics.values())
    own = next(iter(found["test"]))
    assert own == f"enhanced (stage {found['stage']})"
    assert found["test_ndcg@10"] == found["test"][own]["ndcg@10"]
    stages = {name: metrics["ndcg@10"] for name, metrics in found["validation"].items()}
    assert max(stages, key=stages.__getitem__) == f"stage {found['stage']}"
    text = (run / "evaluation_results.txt").read_text()
    for name in found["test"]:
        assert f"\n{name} " in text


def test_eval_on_two_devices_repeats_the_test_metrics(run):
    assert main(["eval", str(run), "--device", "cpu:2"]) == 0
    again, found = json.loads((run / "evaluation.json").read_text()), results(run)
    assert again["test"] == pytest.approx(next(iter(found["test"].values())), abs=1e-6)


def ask(capsys, *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main(["recommend", *arguments])
    output = capsys.readouterr()
    return status, output.out, output.err


def test_recommendations_have_reasons_and_no_seen_film(run, data, capsys):
    model = load_model(RecipeRun.at(run), config_of_run(RecommendationConfig, RecipeRun.at(run)), data)
    vectors = torch.nn.functional.normalize(model.scorer().items.dot)
    for user in (1, 42):
        status, out, _ = ask(capsys, str(run), "--user", str(user), "-k", "5", "--json")
        answer = json.loads(out)
        assert (status, answer["user"], len(answer["films"])) == (0, user, 5)
        known = set(data.seen("train", "validation", "test").items_of(user - 1).tolist())
        assert answer["known"] == len(known)
        scores = [film["score"] for film in answer["films"]]
        assert scores == sorted(scores, reverse=True)
        for film in answer["films"]:
            place = data.item_ids.tolist().index(film["film"])
            assert place not in known
            assert data.item_texts[place] == f"{', '.join(film['genres'])}\n{film['title']}"
            assert set(film["weights"]) == {"id", "genres", "title"}
            assert sum(film["weights"].values()) == pytest.approx(1, abs=1e-5)
            likeness = {data.titles[other]: float(vectors[place] @ vectors[other]) for other in known}
            best = sorted(likeness.values(), reverse=True)[:3]
            assert [value for _, value in film["similar"]] == pytest.approx(best, abs=1e-5)
            assert all(value == pytest.approx(likeness[title], abs=1e-5) for title, value in film["similar"])
        assert set(answer["weights"]) == {"id", "gender", "age", "occupation"}
    _, out, _ = ask(capsys, str(run), "--user", "42", "-k", "5")
    assert f" 1. {answer['films'][0]['title']}, " in out
    assert "; like " in out


def test_a_large_k_returns_all_unseen_films(run, data, capsys):
    _, out, _ = ask(capsys, str(run), "--user", "3", "-k", "1000", "--json")
    answer = json.loads(out)
    assert len({film["film"] for film in answer["films"]}) == len(answer["films"]) == data.n_items - answer["known"]


def test_impossible_recommendations_are_rejected(run, folder, tmp_path, capsys):
    assert ask(capsys, str(run), "--user", "61")[::2][1].endswith("its 60 users are 1 to 60\n")
    assert "k=0" in ask(capsys, str(run), "--user", "1", "-k", "0")[2]
    assert "no run at" in ask(capsys, str(tmp_path), "--user", "1")[2]
    sizes = ["--users", "30", "--films", "40", "--ratings", "600"]
    main(["data", "make", "movielens", "--to", str(tmp_path / "other"), *sizes])
    assert "users is 30 now and was 60" in ask(capsys, str(run), "--user", "1", "--root", str(tmp_path / "other"))[2]
    for arguments in (["a.png"], ["--from", "a.csv"]):
        assert main(["predict", str(run), *arguments]) == 2
        assert f"recommends films to a user: duoka recommend {run} --user NUMBER" in capsys.readouterr().err
    other = tmp_path / "cifar"
    other.mkdir()
    (other / "config.yml").write_text("recipe: cifar100\n")
    assert "a run of `cifar100` recommends nothing" in ask(capsys, str(other), "--user", "1")[2]


def weights(run: Path, stage: int = 2) -> dict[str, torch.Tensor]:
    return load_file(run / f"stage-{stage}" / "model.safetensors")


def scores(run: Path, data: ML1MDataset, stage: int = 2) -> torch.Tensor:
    """Return all scores by a stage's best weights, in standard deviations from their mean."""
    config = RecommendationConfig(pretrained="none", embedding_size=16)
    model = build_model(config, data, load_texts(config, data), stage)
    RankingModelWithLoss(model, RankingEvaluator.of(data, "validation")).load_state_dict(weights(run, stage))
    found = model.score_all(torch.arange(data.n_users))
    return (found - found.mean()) / found.std()


def assert_close(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], tolerance: float) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.allclose(value.float(), second[name].float(), atol=tolerance, rtol=tolerance), name


@pytest.fixture(scope="module")
def longer(folder) -> Path:
    """A run on one device whose stage 2 has two epochs."""
    return trained(folder, "longer", "--dynamic_epochs", "2", "--baselines", "false")


@pytest.fixture(scope="module")
def on_two(folder) -> Path:
    """The first run again, on two devices."""
    return trained(folder, "two", "--device", "cpu:2", "--baselines", "false")


@pytest.mark.parametrize("stage", [1, 2])
def test_one_and_two_devices_take_the_same_steps(data, stage):
    """With SGD, since Adam makes a large step of a gradient that is only rounding."""
    config = RecommendationConfig(pretrained="none", embedding_size=16)
    texts = load_texts(config, data)
    evaluator = RankingEvaluator.of(data, "validation")
    found = []
    for device in ("cpu", "cpu:2"):
        model = build_model(config, data, texts, stage)
        samples = negative_sampling.TripletDataset(data.train.pairs, data.seen(), data.n_items)
        options = {
            "device": device,
            "batch_size_means": "global",
            "optimizer": "sgd",
            "lr": 0.5,
            "epochs": 2,
            "verbose": False,
        }
        trainer = Trainer(
            RankingModelWithLoss(model, evaluator),
            negative_sampling.loader(samples, 300),
            evaluator.loader(),
            metrics=mean_metrics(),
            **options,
        )
        validation, _ = trainer.fit(save_model=False)
        assert validation == pytest.approx(evaluator.evaluate(model.scorer().score_all), abs=1e-6)
        found.append({name: value.detach().clone() for name, value in model.state_dict().items()})
    own, other = found
    assert_close(own, other, 2e-6)
    assert not torch.equal(
        own["user.ids.weight"], build_model(config, data, texts, stage).state_dict()["user.ids.weight"]
    )


def test_negatives_with_cold_films_have_training_ratings(folder):
    data = ML1MDataset(folder / "data", split="cold-films")
    samples, known = training_samples(RecommendationConfig(split="cold-films"), data), set(data.train.items.tolist())
    drawn = set()
    for epoch in range(20):
        samples.set_epoch(epoch)
        drawn |= set(samples.negatives.tolist())
    assert drawn == known
    assert len(known) < data.n_items


def test_each_evaluation_uses_the_present_weights(data):
    """A fused optimizer changes weights without their version counters."""
    evaluator = RankingEvaluator.of(data, "validation")
    model = build_model(RecommendationConfig(model="ncf", embedding_size=16), data, None, 1)
    found, samples = [], negative_sampling.TripletDataset(data.train.pairs, data.seen(), data.n_items)

    class Recorder(Callback):
        def on_evaluate(self, state):
            found.append((state.validation, evaluator.evaluate(model.scorer().score_all)))

    optimizer = two_lr_groups(model, lr=0.05, text_lr=0.05)
    loaders = negative_sampling.loader(samples, 64), evaluator.loader()
    options = {"device": "cpu", "optimizer": optimizer, "epochs": 3, "verbose": False, "callbacks": [Recorder()]}
    trainer = Trainer(RankingModelWithLoss(model, evaluator), *loaders, metrics=mean_metrics(), **options)
    trainer.fit(save_model=False)
    for metrics, expected in found:
        assert metrics == pytest.approx(expected, abs=1e-12)
    assert len({metrics["ndcg@10"] for metrics, _ in found}) == 3


def test_runs_on_one_and_two_devices_agree(run, on_two, data):
    """By scores, not weights: AdamW makes a step of a gradient that is only rounding."""
    found = [(scores(run, data, stage), scores(on_two, data, stage)) for stage in (1, 2)]
    assert all((one - two).abs().max() < ADAMW_ROUNDING for one, two in found)
    assert (found[1][0] - found[0][0]).abs().max() > 10 * ADAMW_ROUNDING  # stage 2 changes them far more
    first, second = (results(one)["test"]["enhanced (stage 2)"] for one in (run, on_two))
    assert first == pytest.approx(second, abs=0.05)


def test_a_run_on_two_devices_resumes_in_stage_2_on_one(on_two, longer, data, capsys):
    capsys.readouterr()
    assert main(["train", "movielens", "--resume", str(on_two), "--device", "cpu", "--dynamic_epochs", "2"]) == 0
    printed = capsys.readouterr()
    assert "stage-2/checkpoint/last.pt" in printed.out + printed.err
    assert results(on_two)["epochs"] == {"stage 1": 2, "stage 2": 2}
    assert (scores(on_two, data) - scores(longer, data)).abs().max() < ADAMW_ROUNDING


def test_stage_1_options_are_fixed_after_stage_2_started(run, capsys):
    assert main(["train", "movielens", "--resume", str(run), "--epochs", "5"]) == 2
    assert "epochs=5 is not valid: it was 2 in this run" in capsys.readouterr().err
    assert main(["train", "movielens", "--resume", str(run), "--patience", "7"]) == 2
    assert "patience=7 is not valid: it was 0 in this run" in capsys.readouterr().err
    assert main(["train", "movielens", "--resume", str(run), "--dynamic_lr", "0.5"]) == 2
    assert "which has dynamic_lr=0.003" in capsys.readouterr().err
    assert yaml.safe_load((run / "config.yml").read_text())["dynamic_lr"] == 0.003
    assert main(["train", "movielens", "--resume", str(run), "--train_text", "full"]) == 2
    assert "which has train_text=lora" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_interrupted_in_stage_2_resumes_bit_identically(folder, tmp_path):
    """Ctrl-C in a process, after stage 2 has written a checkpoint; the weights equal those of an uninterrupted run."""
    options = [*SMALL, "--baselines", "false", "--device", "cpu", "--epochs", "1", "--dynamic_epochs", "3"]
    options += ["--root", str(folder / "data"), "--batch_size", "128", "--model", "concatenation"]
    command = [sys.executable, "-m", "duoka", "train", "movielens", *options, "--out", str(tmp_path / "a")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        saved = "a/movielens/*/stage-2/checkpoint/last.pt"
        wait_until(lambda: process.poll() is not None or list(tmp_path.glob(saved)), timeout_s=120, interval_s=0.01)
        assert process.poll() is None, process.stderr.read()
        process.send_signal(signal.SIGINT)
        _, message = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    (stopped,) = (tmp_path / "a" / "movielens").iterdir()
    assert process.returncode == 130
    assert f"duoka train movielens --resume {stopped}" in message
    assert not (stopped / "model.safetensors").exists()
    assert main(["train", "movielens", "--resume", str(stopped)]) == 0
    assert main(["train", "movielens", *options, "--out", str(tmp_path / "b")]) == 0
    (whole,) = (tmp_path / "b" / "movielens").iterdir()
    assert results(stopped)["epochs"] == {"stage 1": 1, "stage 2": 3}
    for name in ("stage-1", "stage-2"):
        first, second = (load_file(one / name / "model.safetensors") for one in (stopped, whole))
        assert all(torch.equal(value, second[key]) for key, value in first.items()), name


LEARNING = shlex.split(
    "--pretrained none --device cpu --embedding_size 32 --batch_size 512 --lr 0.01 --epochs 8 "
    "--dynamic_epochs 0 --id_dropout 0.5"
)


@pytest.fixture(scope="module")
def larger(tmp_path_factory) -> Path:
    """Data that are large enough to learn from."""
    folder = tmp_path_factory.mktemp("larger")
    synthetic_movielens.write(folder, synthetic_movielens.make(300, 240, 14_000))
    return folder


def ndcg_of_run(root: Path, out: Path, *options: str) -> dict:
    assert main(["train", "movielens", "--root", str(root), "--out", str(out), *LEARNING, *options]) == 0
    (run,) = (out / "movielens").iterdir()
    return {name: metrics["ndcg@10"] for name, metrics in results(run)["test"].items()}


def test_the_model_learns_planted_preferences(larger, tmp_path):
    found = ndcg_of_run(larger, tmp_path)
    assert found["enhanced (stage 1)"] > 1.3 * found["popularity"] > 0


def test_texts_rank_films_without_training_ratings(larger, tmp_path):
    """Popularity scores all of them 0, which leaves them in the order of the file."""
    found = ndcg_of_run(larger, tmp_path, "--split", "cold-films", "--split_ratio", "0.6,0.1,0.3")
    assert found["enhanced (stage 1)"] > 1.1 * found["popularity"]
    assert found["itemknn"] == found["popularity"]


def test_ncf_trains_without_texts(folder):
    run = trained(folder, "ncf", "--model", "ncf", "--split", "time", "--baselines", "false")
    found = results(run)
    assert list(found["test"]) == ["ncf (stage 1)"]
    assert not (run / "stage-2").exists()
    assert main(["recommend", str(run), "--user", "5"]) == 0


@pytest.mark.parametrize(
    ("file", "line", "words"),
    [
        ("ratings.dat", "1::2", "ratings.dat, line 1301 has 2 fields"),
        ("ratings.dat", "1::2::6::1", "ratings.dat, line 1301"),
        ("movies.dat", "900::::Drama", "movies.dat, line 51: film 900 has no title"),
    ],
)
def test_bad_files_are_rejected_before_anything_is_written(folder, tmp_path, capsys, file, line, words):
    for path in (folder / "data").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes() + (f"{line}\n".encode() if path.name == file else b""))
    assert (
        main(["train", "movielens", "--root", str(tmp_path), "--out", str(tmp_path / "runs"), "--device", "cpu"]) == 2
    )
    assert words in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_download_false_forbids_the_download(tmp_path, capsys):
    options = ["--root", str(tmp_path), "--download", "false", "--device", "cpu", "--out", str(tmp_path / "runs")]
    assert main(["train", "movielens", *options]) == 2
    assert "duoka data make movielens" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"embedding_size": 30}, "embedding_size=30 is not valid: it must be a multiple of heads=4"),
        ({"split_ratio": "0.8;0.2"}, "split_ratio='0.8;0.2' is not valid"),
        ({"split_ratio": "0.8,0.2"}, "the shares of training, validation and test"),
        ({"text_lr": 0.0}, "text_lr=0.0 is not valid: it must be a finite number, above 0"),
        ({"lr": math.inf}, "lr=inf is not valid"),
        ({"model": "gcn"}, "it must be one of enhanced, concatenation, ncf"),
    ],
)
def test_invalid_options_are_rejected(options, words):
    with pytest.raises(ConfigError) as rejected:
        RecommendationConfig(**options)
    assert words in str(rejected.value)


def test_data_make_prints_reachable_metrics_and_the_next_command(tmp_path, capsys):
    sizes = ["--users", "80", "--films", "60", "--ratings", "1700"]
    assert main(["data", "make", "movielens", "--to", str(tmp_path / "set"), *sizes]) == 0
    first, truth, popular, following = capsys.readouterr().out.splitlines()
    assert first == f"wrote {tmp_path / 'set'}: 80 users, 60 films, 1,700 ratings, in the format of MovieLens-1M"
    assert float(truth.rpartition(" ")[2]) > 1.5 * float(popular.rpartition(" ")[2]) > 0
    assert following.startswith("next: ")
    assert following.endswith(f"duoka train movielens --root {tmp_path / 'set'} --pretrained none")


def test_data_make_rejects_sizes_of_other_examples(tmp_path, capsys):
    assert main(["data", "make", "movielens", "--rows", "5", "--to", str(tmp_path / "x")]) == 2
    assert "--rows is no size of movielens; its sizes are --users, --films, --ratings" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
