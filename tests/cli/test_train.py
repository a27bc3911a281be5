"""``duoka train`` and ``duoka eval``: real runs on the digits, from the options to the last file."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from duoka.cli.main import main

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
SHORT = ["--dataset", "digits", "--device", "cpu", "--epochs", "2", "--width", "0.0625"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """So small a model is fastest on one thread, and much slower on two that other processes want as well."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run of two epochs."""
    out = tmp_path_factory.mktemp("out")
    assert main(["train", "cifar100", *SHORT, "--out", str(out), "--name", "short"]) == 0
    (folder,) = (out / "cifar100").iterdir()
    return folder


def lines_of(capsys) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_train_without_a_recipe_lists_the_recipes(capsys):
    assert main(["train"]) == 0
    shown = capsys.readouterr().out
    assert "cifar100       ResNets on CIFAR-100" in shown
    assert "duoka train cifar100 --dataset digits --device cpu:2" in shown


def test_the_run_folder_has_every_documented_file(run):
    found = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert {
        "config.yml",
        "trainer.yml",
        "metrics.jsonl",
        "log.txt",
        "model.safetensors",
        "results.json",
        "checkpoint/last.pt",
        "plots/curves.png",
        "plots/confusion.png",
        "plots/class_accuracy.png",
        "plots/examples.png",
        "samples/7.png",
    } <= found
    assert not [name for name in found if name.endswith((".part", ".tmp"))]
    for path in run.rglob("*.png"):
        with Image.open(path) as picture:
            picture.verify()


def test_config_has_every_option_resolved_and_repeats_the_run(run, here, capsys):
    options = yaml.safe_load((run / "config.yml").read_text(encoding="utf-8"))
    assert options["recipe"] == "cifar100"
    assert {key for key, value in options.items() if value is None} == {"resume"}
    assert main(["train", "cifar100", "-c", str(run / "config.yml"), "--out", "again"]) == 0
    (again,) = (here / "again" / "cifar100").iterdir()
    first, second = load_file(run / "model.safetensors"), load_file(again / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert json.loads((again / "results.json").read_text()) == json.loads((run / "results.json").read_text())
    *_, accuracy, folder, following = lines_of(capsys)
    assert accuracy.startswith("test accuracy: 0.")
    assert folder == f"run folder: {again.relative_to(here)}"
    assert f"duoka predict {again.relative_to(here)} " in following
    assert main(shlex.split(following)[2:]) == 0


def test_another_seed_gives_another_model(run, here):
    assert main(["train", "cifar100", "-c", str(run / "config.yml"), "--out", "again", "--seed", "1"]) == 0
    (again,) = (here / "again" / "cifar100").iterdir()
    assert not torch.equal(
        load_file(run / "model.safetensors")["fc.weight"], load_file(again / "model.safetensors")["fc.weight"]
    )


def test_results_agree_with_the_last_epoch_and_with_each_other(run):
    results = json.loads((run / "results.json").read_text())
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["epoch"] == 2
    assert results["test_accuracy"] == pytest.approx(next(v for k, v in last.items() if k.endswith("accuracy")))
    by_class = results["class_accuracy"]
    assert sorted(by_class) == [str(digit) for digit in range(10)]
    assert sum(by_class.values()) / 10 == pytest.approx(results["test_accuracy"], abs=0.01)


def test_eval_gives_the_numbers_of_training(run, capsys):
    assert main(["eval", str(run)]) == 0
    trained, again = (json.loads((run / name).read_text()) for name in ("results.json", "evaluation.json"))
    assert again == {name: trained[name] for name in ("test_loss", "test_accuracy")}
    assert f"test accuracy: {trained['test_accuracy']:.4f}" in lines_of(capsys)


def test_eval_on_another_number_of_devices_gives_the_same_accuracy(run):
    before = json.loads((run / "results.json").read_text())
    assert main(["eval", str(run), "--device", "cpu:2"]) == 0
    after = json.loads((run / "evaluation.json").read_text())
    assert after["test_accuracy"] == before["test_accuracy"]
    assert after["test_loss"] == pytest.approx(before["test_loss"], rel=1e-5)


def test_a_folder_of_images_is_trained_on_and_predicted(here, capsys, monkeypatch):
    for label, name in enumerate(("猫", "狗")):
        (here / "pets" / name).mkdir(parents=True)
        for number in range(20):
            Image.new("RGB", (40, 30 + number), (200 * label, 50, 5 * number)).save(
                here / "pets" / name / f"{number}.png"
            )
    options = ["--dataset", "folder", "--root", "pets", "--image_size", "16", "--model", "resnet10", "--width", "0.1"]
    assert (
        main(
            [
                "train",
                "cifar100",
                *options,
                "--batch_size",
                "8",
                "--epochs",
                "4",
                "--device",
                "cpu",
                "--num_workers",
                "0",
            ]
        )
        == 0
    )
    following = lines_of(capsys)[-1]
    assert main(shlex.split(following)[2:]) == 0
    assert "samples/狗.png: 狗 " in capsys.readouterr().out
    (run,) = (here / "runs" / "cifar100").iterdir()
    monkeypatch.chdir(here / "pets")
    assert main(["eval", str(run)]) == 0  # from another folder, with the same data


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adagrad", "rmsprop"])
def test_every_optimizer_trains_with_a_schedule(here, optimizer):
    schedule = {"sgd": "multistep", "adam": "cosine"}.get(optimizer, "onecycle")
    options = [*SHORT, "--optimizer", optimizer, "--scheduler", schedule, "--batch_size", "256"]
    assert main(["train", "cifar100", *options]) == 0
    (found,) = (here / "runs" / "cifar100").iterdir()
    losses = [json.loads(line)["train_loss"] for line in (found / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "cifar10"], "did you mean 'cifar100'?"),
        (["train", "cifar100", "--bsise", "3"], "did you mean '--bsize'?"),
        (["train", "cifar100", "--download", "false", "--device", "cpu"], "--download true"),
        (["train", "cifar100", *SHORT, "--device", "cpu:x"], "device 'cpu:x' is not valid"),
        (["train", "cifar100", *SHORT, "--out", "file"], "file is a file: choose another --out"),
        (["train", "cifar100", "--resume", "none"], "no run at none"),
        (["eval", "none"], "no run at none"),
        (
            ["train", "cifar100", *SHORT, "--device", "cpu:2", "--batch_size", "1"],
            "batch_size=1 (global, 2 devices) gives a device only one image, and batch norm needs two; write --batch_size 6",
        ),
        (
            ["train", "cifar100", *SHORT, "--batch_size", "479"],
            "batch_size=479 (global, 1 device) leaves 1 of 1,438 images for the last batch and gives a device only one image",
        ),
    ],
)
def test_a_mistake_is_one_message_and_leaves_nothing(here, capfd, words, message):
    (here / "file").write_text("in the way")
    assert main(words) == 2
    shown = capfd.readouterr()
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert [path.name for path in here.iterdir()] == ["file"]


def test_a_checkpoint_of_another_model_is_refused_key_by_key(run, here, capfd):
    text = (run / "config.yml").read_text().replace("width: 0.0625", "width: 0.125")
    (here / "config.yml").write_text(text)
    for name in ("model.safetensors", "results.json"):
        (here / name).write_bytes((run / name).read_bytes())
    assert main(["eval", str(here)]) == 2
    assert "conv1.weight" in capfd.readouterr().err


def test_a_resume_that_is_refused_leaves_the_run_as_it_was(run, here, capfd):
    copied = shutil.copytree(run, here / "copied")
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    for option in (["--optimizer", "sgd"], ["--epochs", "3"], ["--model", "resnet18"]):
        assert main(["train", "cifar100", "--resume", str(copied), *option]) == 2
        assert "Traceback" not in capfd.readouterr().err
        assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before
    assert main(["train", "cifar100", "--resume", str(copied)]) == 0


def test_a_batch_larger_than_the_data_is_reported(here, caplog):
    assert main(["train", "cifar100", *SHORT, "--epochs", "1", "--batch_size", "100000"]) == 0
    assert "batch_size=100,000 is more than the 1,438 images" in caplog.text


def test_an_interruption_before_the_first_epoch_leaves_no_folder(here, monkeypatch, capfd):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("duoka.recipes.image_classification.train.Trainer.fit", interrupted)
    assert main(["train", "cifar100", *SHORT]) == 130
    assert not list(here.rglob("*digits*"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_and_resumed_run_is_bit_identical(tmp_path):
    command = [sys.executable, "-m", "duoka", "train", "cifar100", *SHORT, "--epochs", "3"]
    subprocess.run([*command, "--out", "whole"], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL, env=ONE_THREAD)
    victim = subprocess.Popen([*command, "--out", "killed"], cwd=tmp_path, stdout=subprocess.DEVNULL, env=ONE_THREAD)
    _wait_for_epochs(tmp_path / "killed", 1)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    (killed,) = (tmp_path / "killed" / "cifar100").iterdir()
    assert not (killed / "model.safetensors").exists()
    resumed = [sys.executable, "-m", "duoka", "train", "cifar100", "--resume", str(killed)]
    subprocess.run(resumed, cwd=tmp_path, check=True, stdout=subprocess.DEVNULL, env=ONE_THREAD)
    (whole,) = (tmp_path / "whole" / "cifar100").iterdir()
    first, second = load_file(whole / "model.safetensors"), load_file(killed / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (whole / "results.json").read_text() == (killed / "results.json").read_text()
    assert len((killed / "metrics.jsonl").read_text().splitlines()) == 3


def _wait_for_epochs(out: Path, epochs: int) -> None:
    until = time.monotonic() + 90
    while time.monotonic() < until:
        for path in out.glob("cifar100/*/metrics.jsonl"):
            if len(path.read_text().splitlines()) >= epochs:
                return
        time.sleep(0.02)
    pytest.fail(f"no {epochs} epochs within 90 s")


@pytest.mark.slow
def test_the_demo_reads_digits_with_two_workers(tmp_path):
    command = [sys.executable, "-m", "duoka", "train", "cifar100", "--dataset", "digits", "--device", "cpu:2"]
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    accuracy, folder = done.stdout.splitlines()[-3:-1]
    assert float(accuracy.removeprefix("test accuracy: ")) >= 0.97
    assert (tmp_path / folder.removeprefix("run folder: ") / "plots" / "confusion.png").is_file()
    assert done.stderr == ""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_signal_saves_and_the_printed_command_continues(tmp_path, number, status):
    command = [sys.executable, "-m", "duoka", "train", "cifar100", *SHORT, "--epochs", "200", "--batch_size", "256"]
    running = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ONE_THREAD
    )
    _wait_for_epochs(tmp_path / "runs", 1)
    running.send_signal(number)
    _, shown = running.communicate(timeout=60)
    assert running.returncode == status
    assert shown.endswith(f"duoka: stopped by {number.name}\n")
    (folder,) = (tmp_path / "runs" / "cifar100").iterdir()
    assert not (folder / "model.safetensors").exists()
    *_, words = next(line for line in shown.splitlines() if "continue with: " in line).partition("continue with: ")
    resumed = ["-m", "duoka", *shlex.split(words)[shlex.split(words).index("train") :], "--hours", "0.000001"]
    done = subprocess.run([sys.executable, *resumed], cwd=tmp_path, capture_output=True, text=True, env=ONE_THREAD)
    assert done.returncode == 124
    assert "resumed: " in done.stdout
    assert "duoka: the time limit, --hours, is over" in done.stderr
    assert words in done.stderr


def test_resume_auto_continues_the_last_run_with_the_same_options(here):
    words = ["train", "cifar100", *SHORT, "--epochs", "1", "--batch_size", "512", "--resume", "auto"]
    assert main(words) == 0
    (first,) = (here / "runs" / "cifar100").iterdir()
    before = load_file(first / "model.safetensors")
    assert main(words) == 0
    assert [first] == list((here / "runs" / "cifar100").iterdir())
    assert "nothing is left to train" in (first / "log.txt").read_text()
    assert all(torch.equal(one, before[name]) for name, one in load_file(first / "model.safetensors").items())
    assert main([*words, "--seed", "1"]) == 0
    assert len(list((here / "runs" / "cifar100").iterdir())) == 2


def test_an_empty_resume_is_refused(here, capfd):
    assert main(["train", "cifar100", *SHORT, "--resume", ""]) == 2
    assert "resume='' is not valid" in capfd.readouterr().err
