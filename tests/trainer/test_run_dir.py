"""Log and files of a fit, callbacks, and cleanup after an error."""

from __future__ import annotations

import json
import logging
import sys
import threading
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from duoka.checkpoint import load
from duoka.errors import StorageError
from duoka.trainer import Callback, State, Trainer
from support import tiny_training
from support.tiny_training import loader

pytestmark = pytest.mark.usefixtures("pickle_by_value")


def trainer_of(**options) -> Trainer:
    settings = {"eval_data": loader(), "test_data": loader(), "epochs": 3, "tensorboard": False}
    return tiny_training.trainer_of(**(settings | options))


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("device", ["cpu", "cpu:2"])
def test_a_run_folder_holds_the_whole_run(tmp_path, device):
    trainer = trainer_of(out_dir=tmp_path / "run", device=device, lr=0.01, monitor="loss")
    trainer.fit()
    expected = {
        "trainer.yml",
        "metrics.jsonl",
        "log.txt",
        "model.safetensors",
        "checkpoint/last.pt",
        "checkpoint/last-1.pt",
        "plots/curves.png",
    }
    assert files(tmp_path / "run") == expected
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert records == trainer.history
    names = {"epoch", "step", "samples", "train_loss", "val_loss", "lr", "seconds", "samples_per_s"}
    assert set(records[0]) == names
    assert [record["samples"] for record in records] == [12, 24, 36]
    assert yaml.safe_load((tmp_path / "run" / "trainer.yml").read_text())["lr"] == 0.01
    assert (tmp_path / "run" / "plots" / "curves.png").read_bytes().startswith(b"\x89PNG")
    weights = load(tmp_path / "run" / "model.safetensors")
    assert set(weights) == {"weight", "bias"}
    assert torch.equal(weights["weight"], trainer.model.weight)


def test_nothing_is_written_without_out_dir_or_model_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer_of().fit()
    assert files(tmp_path) == set()
    trainer_of().fit(model_path="weights.pth")
    assert files(tmp_path) == {"weights.pth"}
    trainer_of(out_dir="run").fit(save_model=False)
    assert "run/model.safetensors" not in files(tmp_path)


def test_a_new_run_in_an_old_folder_begins_new_records(tmp_path):
    for epochs in (3, 2):
        trainer_of(out_dir=tmp_path, epochs=epochs).fit()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_new_run_sets_the_weights_of_another_name_aside_too(tmp_path):
    for _ in range(2):
        trainer_of(out_dir=tmp_path, tensorboard=False).fit(model_path=tmp_path / "model.pt")
    (aside,) = tmp_path.glob("before-*")
    assert {"model.pt", "checkpoint/last.pt"} <= files(aside)


def test_an_unfinished_write_is_no_result_of_a_run(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / ".next.pt.12345678.duoka-tmp").touch()
    trainer_of(out_dir=tmp_path, tensorboard=False).fit()
    assert not list(tmp_path.glob("before-*"))


def test_tensorboard_events_are_written_and_closed(tmp_path):
    pytest.importorskip("tensorboard")
    threads = threading.active_count()
    trainer_of(out_dir=tmp_path, tensorboard=True).fit()
    assert list(tmp_path.glob("events.out.tfevents.*"))
    assert threading.active_count() == threads


def test_a_folder_that_cannot_be_written_is_an_error_before_training(tmp_path):
    (tmp_path / "file").write_text("in the way")
    trainer = trainer_of(out_dir=tmp_path / "file" / "run")
    before = trainer.model.weight.clone()
    with pytest.raises(StorageError, match="out_dir"):
        trainer.fit()
    assert torch.equal(trainer.model.weight, before)


def test_a_log_that_cannot_be_written_raises_a_storage_error(tmp_path):
    class Fill(Callback):
        def on_fit_start(self, state):
            assert not state.history
            (tmp_path / "log.txt").unlink()
            (tmp_path / "log.txt").symlink_to("/dev/full")

    with pytest.raises(StorageError, match=r"log\.txt.*space"):
        trainer_of(out_dir=tmp_path, callbacks=[Fill()]).fit()


def test_the_log_has_a_summary_and_one_line_per_epoch(capsys, tmp_path):
    model = nn.Sequential(nn.Linear(5, 1000), nn.ReLU(), nn.Linear(1000, 2))
    options = {"lr": 0.1, "lr_scaling": "linear", "verbose": True, "out_dir": tmp_path, "epochs": 2, "monitor": "loss"}
    trainer_of(model=model, device="cpu:2", **options).fit()
    shown = capsys.readouterr().out
    for words in (
        "devices: 2 CPU workers (2 CPU workers were requested)",
        "strategy: ddp (2 ranks",
        "parameters: 8.00K",
        "batch: 4 per device x 2 devices = 8 global",
        "lr 0.1 -> 0.2 (linear)",
        "monitors loss (lower is better)",
        "epoch 1/2 · loss ",
        "test: loss ",
    ):
        assert shown.count(words) == 1, words
    assert (tmp_path / "log.txt").read_text() == shown


@pytest.mark.parametrize(
    ("means", "batch"),
    [
        ("per_device", "1 per device x 2 devices = 2 global"),
        ("global", "1 global, fewer than devices x accumulated: some devices have no sample"),
    ],
)
def test_the_log_shows_a_batch_of_one_sample_on_two_devices(means, batch, capsys):
    trainer_of(train_data=loader(3, 1), batch_size_means=means, device="cpu:2", epochs=1, verbose=True).fit()
    assert f"batch: {batch}\n" in capsys.readouterr().out


def test_a_silent_fit_prints_nothing(capsys):
    trainer_of(device="cpu:2").fit()
    assert capsys.readouterr() == ("", "")


def test_the_live_line_shows_progress_and_is_removed(monkeypatch):
    import io

    from rich.console import Console

    from duoka.trainer import progress

    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120)
    monkeypatch.setattr(progress, "LIVE_INTERVAL_S", 0.0)
    monkeypatch.setattr("duoka.trainer.fit_loop.reporter_for", lambda _: progress.LiveReporter(console))
    trainer_of(verbose=True, epochs=1).fit()
    shown = stream.getvalue()
    assert "3/3" in shown
    assert "samples/s" in shown
    assert "devices: the CPU" in shown
    assert shown.endswith("\x1b[?25h") or "\x1b[?25h" in shown  # the cursor is back


class Watcher(Callback):
    def __init__(self) -> None:
        self.events: list[tuple[str, int, int]] = []
        self.lock = threading.Lock()  # cannot be pickled: callbacks stay on rank 0

    def on_fit_start(self, state: State) -> None:
        self.events.append(("start", state.epoch, state.step))

    def on_step_end(self, state: State) -> None:
        self.events.append(("step", state.epoch, state.step))

    def on_evaluate(self, state: State) -> None:
        assert "loss" in state.validation
        self.events.append(("evaluate", state.epoch, state.step))

    def on_epoch_end(self, state: State) -> None:
        assert state.history[-1]["epoch"] == state.epoch
        self.events.append(("epoch", state.epoch, state.step))

    def on_fit_end(self, state: State) -> None:
        self.events.append(("end", state.epoch, state.step))


@pytest.mark.parametrize(("device", "steps"), [("cpu", 3), ("cpu:2", 2)])
def test_callbacks_are_called_in_order_on_rank_0(device, steps):
    watcher = Watcher()
    trainer_of(callbacks=[watcher], device=device, epochs=1).fit()
    expected = [("start", 0, 0), *[("step", 1, step + 1) for step in range(steps)]]
    assert watcher.events == [*expected, ("evaluate", 1, steps), ("epoch", 1, steps), ("end", 1, steps)]


@pytest.mark.parametrize("device", ["cpu", "cpu:2"])
def test_a_callback_stops_all_ranks_after_a_step_or_an_epoch(device):
    class AfterStep(Callback):
        def on_step_end(self, state):
            assert state.loss > 0
            if state.step == 2:
                state.stop("enough")

    class AfterEpoch(Callback):
        def on_epoch_end(self, state):
            state.stop()

    trainer = trainer_of(callbacks=[AfterStep()], device=device, batch_size_means="global")
    trainer.fit()
    assert (trainer.history[-1]["step"], trainer.stopped) == (2, "enough")
    assert "val_loss" in trainer.history[-1]
    trainer = trainer_of(callbacks=[AfterEpoch()], device=device)
    trainer.fit()
    assert len(trainer.history) == 1


class Fails(nn.Module):
    """A model that fails in its fourth forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 2)
        self.calls = 0

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == 4:
            raise ArithmeticError("the fourth forward")
        return self.layer(features)


@pytest.mark.parametrize("device", ["cpu", "cpu:2"])
def test_an_error_keeps_its_type_and_the_model_its_mode(device, tmp_path):
    model = Fails().eval()
    trainer = trainer_of(model=model, device=device, out_dir=tmp_path, tensorboard=None)
    with pytest.raises(ArithmeticError, match="the fourth forward"):
        trainer.fit()
    assert not any(part.training for part in model.modules())
    trainer.fit()  # and the trainer still works


def test_a_nan_loss_is_warned_of_once(caplog):
    trainer = trainer_of(loss=lambda output, _: output.sum() * float("nan"), epochs=2, on_nonfinite_loss="warn")
    with caplog.at_level(logging.WARNING, "duoka"):
        trainer.fit()
    assert [record.getMessage()[:21] for record in caplog.records] == ["the loss became nan i"]


def test_the_users_own_config_in_the_folder_stays_unchanged(tmp_path):
    (tmp_path / "config.yml").write_text("mine: true\n")
    trainer_of(out_dir=tmp_path).fit()
    assert (tmp_path / "config.yml").read_text() == "mine: true\n"


def test_the_estimated_time_left_ends_at_max_steps(monkeypatch):
    from duoka.trainer import progress

    shown = []

    class Notes(progress.Reporter):
        due = 0.0

        def show(self, _, text):
            shown.append(text.rpartition(" · ")[2])

    monkeypatch.setattr("duoka.trainer.fit_loop.reporter_for", lambda _: Notes())
    trainer_of(epochs=1000, max_steps=2).fit()
    assert len(shown) == 2
    assert shown[-1] == "0 ms left"


def test_an_epoch_is_in_the_checkpoint_before_its_line_is_printed(tmp_path, monkeypatch):
    """A user who reads its line may interrupt the run without losing the epoch."""
    saved, last = [], tmp_path / "checkpoint" / "last.pt"

    class Screen:
        def write(self, text: str) -> int:
            if text.startswith("epoch ") and "lr " in text:
                saved.append(last.stat().st_mtime_ns if last.exists() else None)
            return len(text)

        def flush(self) -> None:
            pass

    monkeypatch.setattr(sys, "stdout", Screen())
    trainer_of(out_dir=tmp_path, verbose=True).fit()
    assert len(set(saved)) == 3
    assert None not in saved
