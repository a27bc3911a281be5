"""``duoka compare``: skip of finished trials, resume of interrupted ones, isolated failures, and the summary."""

import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure
from PIL import Image

from duoka.cli.main import main
from duoka.errors import LaunchError
from duoka.recipes.experiments import parallel_runner, plots, read_experiment
from duoka.recipes.experiments.experiment_spec import Trial
from duoka.recipes.experiments.trial_run import finished_run, prepare_folder
from support.paths import ROOT
from support.processes import descendants, wait_until_gone, worker_pids
from support.waiting import wait_until

SUITE = ROOT / "examples" / "tiny_imagenet_suite.yml"
BASE = {
    "dataset": "folder", "root": "pictures", "image_size": 16, "device": "cpu", "epochs": 1, "batch_size": 8,
    "width": 0.0625, "model": "resnet10",
}  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A working folder with a folder of bright and dark pictures."""
    random = np.random.default_rng(0)
    for name, low in (("bright", 160), ("dark", 0)):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(15):
            pixels = random.integers(low, low + 90, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, **changes) -> str:
    document = {
        "recipe": "cifar100",
        "base": BASE,
        "variants": {"slow": {"lr": 0.001}, "fast": {"lr": 0.01}},
        **changes,
    }
    (folder / "few.yml").write_text(yaml.safe_dump(document, sort_keys=False))
    return "few.yml"


def test_variants_are_trained_compared_and_then_skipped(here, capsys):
    file = write(here, seeds=[0, 1])
    assert main(["compare", file]) == 0
    folder = here / "runs" / "compare" / "few"
    shown = capsys.readouterr().out
    assert "±" in shown
    assert "baseline" in shown
    rows = json.loads((folder / "results.json").read_text())
    assert [row["variant"] for row in rows] == ["slow", "fast"]
    table = (folder / "table.md").read_text()
    for row in rows:
        assert f"| {statistics.fmean(row['best']):.4f} ± {statistics.stdev(row['best']):.4f} |" in table
        for seed in (0, 1):
            (run,) = (folder / f"{row['variant']}-seed{seed}" / "cifar100").iterdir()
            values = [json.loads(line)["val_accuracy"] for line in (run / "metrics.jsonl").read_text().splitlines()]
            assert row["best"][seed] == max(values)
            assert row["last"][seed] == values[-1]
            assert row["parameters"] == json.loads((run / "results.json").read_text())["parameters"] > 0
    for name in ("best", "curves", "contribution"):
        with Image.open(folder / "plots" / f"{name}.png") as picture:
            picture.verify()
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("model.safetensors")}
    assert main(["compare", file, "--device", "cpu"]) == 0
    assert capsys.readouterr().out.count("finished, skipped") == 4
    for note in folder.glob("*/cifar100/*/config.yml"):  # as an earlier version without this option wrote it
        note.write_text("".join(line for line in note.read_text().splitlines(True) if "momentum" not in line))
    (here / "pictures").rename(here / "elsewhere")  # finished trials need no data
    assert main(["compare", file]) == 0
    assert capsys.readouterr().out.count("finished, skipped") == 4
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("model.safetensors")} == times


def test_a_changed_variant_is_trained_again_and_the_old_run_kept(here):
    assert main(["compare", write(here, variants={"a": {"lr": 0.001}})]) == 0
    assert main(["compare", write(here, variants={"a": {"lr": 0.01}})]) == 0
    folders = sorted(path.name for path in (here / "runs" / "compare" / "few").glob("a-*"))
    assert folders[0] == "a-seed0"
    assert folders[1].startswith("a-seed0-before-")


def test_a_failed_variant_does_not_stop_the_others_and_is_retried(here, capfd, monkeypatch):
    from duoka.recipes.image_classification.presets import CIFAR100

    real = CIFAR100.train

    def fails(config):
        if config.lr == 0.001:
            raise RuntimeError("out of luck")
        return real(config)

    monkeypatch.setattr(CIFAR100, "train", fails)
    file = write(here)
    assert main(["compare", file]) == 1
    assert "slow, seed 0 failed: RuntimeError: out of luck" in capfd.readouterr().err
    folder = here / "runs" / "compare" / "few"
    assert "out of luck" in (folder / "slow-seed0" / "error.txt").read_text()
    assert [row["variant"] for row in json.loads((folder / "results.json").read_text())] == ["fast"]
    monkeypatch.setattr(CIFAR100, "train", real)
    assert main(["compare", file]) == 0
    assert not (folder / "slow-seed0" / "error.txt").exists()
    assert "fast, seed 0: finished, skipped" in capfd.readouterr().out


def test_a_sweep_of_a_recipe_needs_no_file(here, capsys):
    words = ["compare", "cifar100", "--sweep", "lr=0.001,0.01", *(f"--{key}={value}" for key, value in BASE.items())]
    assert main(words) == 0
    assert "lr=0.001" in capsys.readouterr().out
    assert (here / "runs" / "compare" / "cifar100-sweep" / "table.md").read_text().count("| lr=") == 2


def test_parallel_variants_have_the_results_of_sequential_ones(here, capsys):
    file = write(here, base={**BASE, "device": "cpu:2"}, name="parallel")
    assert main(["compare", file, "--parallel"]) == 0
    parallel = json.loads((here / "runs" / "compare" / "parallel" / "results.json").read_text())
    assert main(["compare", write(here, name="sequential")]) == 0
    sequential = json.loads((here / "runs" / "compare" / "sequential" / "results.json").read_text())
    assert [row["best"] for row in parallel] == [pytest.approx(row["best"], abs=0.02) for row in sequential]
    assert (here / "runs" / "compare" / "parallel" / "fast-seed0" / "output.txt").is_file()


@pytest.mark.parametrize(("changes", "message"), [
    ({"variants": {}}, "no variants"),
    ({"variants": {"a": {"lrr": 1}}}, "the variant 'a': unknown key lrr; did you mean 'lr'?"),
    ({"variants": {"a": {"lr": "much"}}}, "the variant 'a': lr='much' is not valid"),
    ({"variants": {"a": {"seed": 3}}}, "write `seeds: [0, 1]`"),
    ({"variants": {"a b": {}, "a-b": {}}}, "differ by punctuation only"),
    ({"baseline": "none"}, "it must be a variant: slow, fast"),
    ({"seeds": 3}, "`seeds` is 3"),
    ({"recipe": "cifar"}, "did you mean 'cifar100'?"),
    ({"varaints": {}}, "unknown key `varaints`"),
    ({"better": "more"}, "higher or lower"),
    ({"base": {**BASE, "epocks": 1}}, "`base` of few.yml: unknown key epocks; did you mean 'epochs'?"),
    ({"base": {**BASE, "image_size": 4}}, "the variant 'slow': image_size=4 is not valid"),
    ({"base": {**BASE, "root": "nowhere"}}, "there is no folder nowhere"),
    ({"base": {**BASE, "device": "cuda:77"}}, "device 'cuda:77' does not exist"),
    ({"variants": {"a": {"model": "resnet19"}}}, "it must be one of resnet10"),
    ({"variants": ["a", "b"]}, "`variants` in few.yml holds a list"),
])  # fmt: skip
def test_a_mistake_in_the_file_is_an_error_before_any_training(here, capfd, changes, message):
    assert main(["compare", write(here, **changes)]) == 2
    check_refused(here, capfd, message)


@pytest.mark.parametrize(("words", "message"), [
    ([], "nothing to compare"),
    (["cifar100"], "`cifar100` alone has nothing to compare: add --sweep"),
    (["cifar100", "--sweep"], "--sweep needs a value"),
    (["cifar100", "--sweep", "lr="], "--sweep is 'lr='"),
    (["cifar100", "--sweep", "lrr=1"], "the variant 'lrr=1': unknown key lrr; did you mean 'lr'?"),
    (["few.yml", "--rooot", "pictures"], "unknown option --rooot; did you mean '--root'?"),
    (["few.yml", "--seed", "3"], "the command line has the key `seed`"),
    (["few.yml", "--root"], "--root needs a value"),
    (["few.yml", "--root", "few.yml", "--dataset", "cifar10"], "few.yml is a file, not a folder"),
    (["fwe.yml"], "cannot read the configuration file fwe.yml"),
])  # fmt: skip
def test_a_mistake_on_the_command_line_is_an_error_before_any_training(here, capfd, words, message):
    write(here)
    assert main(["compare", *words]) == 2
    check_refused(here, capfd, message)


def test_a_repeated_variant_name_is_an_error(here, capfd):
    (here / "few.yml").write_text("recipe: cifar100\nvariants:\n  a: {lr: 0.1}\n  b: {lr: 0.2}\n  a: {lr: 0.3}\n")
    assert main(["compare", "few.yml"]) == 2
    check_refused(here, capfd, "`a` is set in line 3 and in line 5; remove one of them")


def check_refused(here: Path, capfd, message: str) -> None:
    """Check that the output is one line with ``message``, and that nothing was written."""
    (line,) = capfd.readouterr().err.splitlines()
    assert message in line
    assert not (here / "runs").exists()


def test_an_unknown_metric_is_an_error_after_the_first_variant(here, capfd):
    assert main(["compare", write(here, metric="acuracy")]) == 2
    shown = capfd.readouterr()
    assert "metric='acuracy'" in shown.err
    assert "accuracy, loss" in shown.err
    assert "fast" not in shown.out
    assert main(["compare", write(here, metric="loss")]) == 0
    assert capfd.readouterr().out.count("finished, skipped") == 1


def test_the_label_of_a_bar_is_right_of_its_deviation_and_seeds(tmp_path, monkeypatch):
    figure, named = Figure(), [("even", [0.4, 0.6]), ("odd", [0.4, 0.9, 0.42]), ("one", [0.3])]
    monkeypatch.setattr(plots, "figure_file", lambda *_: contextlib.nullcontext(figure))
    plots.plot_bars(tmp_path / "best.png", "accuracy", named)
    (axes,) = figure.axes
    ends = [max(statistics.fmean(v) + (statistics.stdev(v) if len(v) > 1 else 0), *v) for _, v in named]
    assert [label.xy[0] for label in axes.texts] == pytest.approx(ends)
    assert [label.get_text() for label in axes.texts] == ["0.5000", "0.5733", "0.3000"]


def test_a_process_that_cannot_start_ends_the_comparison(tmp_path, monkeypatch):
    trials = [Trial("cifar100", str(number), 0, {"device": "cpu:2"}, tmp_path / str(number)) for number in range(4)]
    has_failed, started = threading.Event(), []

    def run(_, trial: Trial, device: object) -> str:
        started.append(trial.variant)
        if trial is trials[1]:
            has_failed.set()
            raise LaunchError("no memory")
        assert has_failed.wait(10)
        time.sleep(0.2)  # the other thread ends meanwhile
        return ""

    monkeypatch.setattr(parallel_runner._TrialWorkers, "_run_in_worker", run)
    with pytest.raises(LaunchError, match="no memory"):
        parallel_runner.run_parallel(trials, lambda _: None)
    assert sorted(started) == ["0", "1"]


def test_a_variant_with_options_that_do_not_fit_is_not_finished(tmp_path):
    folder = tmp_path / "trial" / "informer" / "20260101-000000-x"
    folder.mkdir(parents=True)
    (folder / "config.yml").write_text("recipe: informer\nseed: 0\n")
    (folder / "model.safetensors").touch()
    (folder / "results.json").write_text("{}")
    assert finished_run(Trial("informer", "a", 0, {}, tmp_path / "trial")) is not None
    changed = Trial("informer", "a", 0, {"seq_len": 8, "label_len": 9}, tmp_path / "trial")
    assert finished_run(changed) is None
    prepare_folder(changed)
    assert not any((tmp_path / "trial").iterdir())


def test_ctrl_c_ends_parallel_variants_and_starts_no_other(here):
    file = write(here, base={**BASE, "epochs": 100_000})
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "duoka", "compare", file, "--parallel"],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    folder = here / "runs" / "compare" / "few"
    wait_until(lambda: list(folder.glob("slow-seed0/*/*/metrics.jsonl")))
    pids = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate()
    assert process.returncode == 130, output
    assert not (folder / "fast-seed0").exists()
    assert pids
    wait_until_gone(pids)


def test_a_killed_trial_is_reported_and_the_others_continue(here):
    """One device, two trials: the test kills the first one's process."""
    file = write(here, base={**BASE, "epochs": 100_000}, variants={"slow": {}, "fast": {"epochs": 1}})
    process = subprocess.Popen(
        [sys.executable, "-m", "duoka", "compare", file, "--parallel"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    folder = here / "runs" / "compare" / "few"
    wait_until(lambda: list(folder.glob("slow-seed0/*/*/metrics.jsonl")))
    os.kill(worker_pids(process.pid)[0], signal.SIGKILL)
    output, _ = process.communicate()
    assert process.returncode == 1, output
    assert "slow, seed 0 failed: its process was killed by SIGKILL" in output
    assert [row["variant"] for row in json.loads((folder / "results.json").read_text())] == ["fast"]
    assert (folder / "slow-seed0" / "output.txt").is_file()


def test_the_example_suite_has_the_guides_nine_experiments():
    spec = read_experiment(str(SUITE))
    assert len(spec.trials) == 9
    configs = {trial.variant: trial.config().resolved() for trial in spec.trials}
    assert {config.model for config in configs.values()} == {
        "baseline",
        "residual",
        "deeper_wider",
        "se_attention",
        "best",
    }
    assert all((config.batch_size, config.lr, config.epochs) == (64, 3e-4, 50) for config in configs.values())
    assert configs["rmsprop + cosine"].scheduler == "cosine"
    assert configs["best"].weight_decay == 1e-6
    assert spec.baseline == "baseline"
    small = read_experiment(str(SUITE), changes={"dataset": "cifar100", "num_workers": "8"}).trials
    assert {(trial.config().resolved().image_size, trial.config().num_workers) for trial in small} == {(32, 8)}


def losses(line: str) -> tuple[int, float]:
    record = json.loads(line)
    return record["epoch"], record["train_loss"]


@pytest.mark.slow
@pytest.mark.extended
def test_a_killed_comparison_resumes_without_repeating_finished_work(here):
    changes = {"a": {}, "b": {"optimizer": "sgd"}, "c": {"optimizer": "rmsprop"}}
    write(here, base={**BASE, "device": "cpu:2", "epochs": 3}, variants=changes)
    command = [sys.executable, "-m", "duoka", "compare", "few.yml"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    victim = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    folder = here / "runs" / "compare" / "few"
    wait_until(lambda: list(folder.glob("a-seed0/*/*/metrics.jsonl")))
    time.sleep(random.uniform(0, 4))
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    before = {path: path.read_text() for path in folder.rglob("metrics.jsonl")}
    finished = {path: path.stat().st_mtime_ns for path in folder.rglob("results.json")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.count("finished, skipped") == len([path for path in finished if path.parent != folder])
    assert all(path.stat().st_mtime_ns == when for path, when in finished.items() if path.parent != folder)
    for path, text in before.items():  # a kill between an epoch's end and its checkpoint repeats that epoch
        lines, now = text.splitlines(), path.read_text().splitlines()
        assert now[: len(lines) - 1] == lines[:-1], "an epoch is repeated"
        assert losses(now[len(lines) - 1]) == losses(lines[-1])
    assert (folder / "table.md").read_text().count("\n| ") == 5
    for variant in "abc":
        assert len(list((folder / f"{variant}-seed0" / "cifar100").glob("*/results.json"))) == 1
