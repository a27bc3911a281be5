"""Resumed runs, which end as runs without interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from duoka.checkpoint import load, load_training, save_training
from duoka.errors import CheckpointError, ConfigError
from duoka.launcher import launch
from duoka.trainer import Callback, Trainer

PROGRAM = textwrap.dedent(
    """
    import os, signal, sys
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset
    from duoka.trainer import Callback, Trainer

    out_dir, device, kill_at, resume = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "resume"

    class Kill(Callback):
        def on_step_end(self, state):
            if state.step == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(40, 6, generator=generator), torch.randint(3, (40,), generator=generator))
    loader = DataLoader(data, batch_size=8, shuffle=True)
    torch.manual_seed(int.from_bytes(os.urandom(4), "little"))  # the state of the user's generator has no effect
    trainer = Trainer(
        model, loader, loader, loss=nn.CrossEntropyLoss(), optimizer="adamw", lr=0.01, weight_decay=0.1, epochs=3,
        scheduler="onecycle", scheduler_options={"max_lr": 0.02}, gradient_accumulation_steps=2,
        batch_size_means="global", device=device, seed=7,
        out_dir=out_dir, checkpoint_every_steps=1, resume=resume, monitor="loss", verbose=False, tensorboard=False,
        callbacks=[Kill()] if kill_at else [],
    )
    trainer.fit()
    from duoka.checkpoint import save
    save(model, os.path.join(out_dir, "final.pt"))
    """
)


def run(folder: Path, device: str, kill_at: int = 0, resume: bool = False) -> subprocess.CompletedProcess:
    temporary = folder.parent / "tmp"  # a process that is killed cannot tidy up
    temporary.mkdir(exist_ok=True)
    arguments = [str(folder), device, str(kill_at), "resume" if resume else "new"]
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "TMPDIR": str(temporary)},
    )


def outcome(folder: Path) -> tuple[dict, list[dict]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = {"seconds", "samples_per_s"}
    return load(folder / "final.pt"), [{k: v for k, v in record.items() if k not in timed} for record in records]


def checked(done: subprocess.CompletedProcess) -> None:
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.extended  # the daily suite has the same test with a killed `duoka train`
@pytest.mark.parametrize("device", ["cpu", "cpu:2"])
def test_a_run_killed_within_an_epoch_resumes_bit_identically(tmp_path, device):
    checked(run(tmp_path / "whole", device))
    killed = run(tmp_path / "killed", device, kill_at=5)  # of 3 steps an epoch: the checkpoint is of step 4, in epoch 2
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "final.pt").exists()
    checked(run(tmp_path / "killed", device, resume=True))
    weights, records = outcome(tmp_path / "killed")
    expected_weights, expected_records = outcome(tmp_path / "whole")
    assert records == expected_records
    assert list(weights) == list(expected_weights)
    assert all(torch.equal(weights[name], expected_weights[name]) for name in weights)


def loader_of(samples: int = 24) -> torch.utils.data.DataLoader:
    generator = torch.Generator().manual_seed(2)
    data = torch.utils.data.TensorDataset(
        torch.randn(samples, 5, generator=generator), torch.randint(3, (samples,), generator=generator)
    )
    return torch.utils.data.DataLoader(data, batch_size=6, shuffle=True)


def trained(folder: Path | None, device: str, **options) -> tuple[torch.nn.Module, Trainer]:
    torch.manual_seed(4)
    model = torch.nn.Linear(5, 3)
    settings = {
        "loss": torch.nn.CrossEntropyLoss(),
        "optimizer": "sgd",
        "optimizer_options": {"momentum": 0.9},
        "lr": 0.1,
        "batch_size_means": "global",
        "epochs": 4,
        "out_dir": folder,
        "verbose": False,
        "tensorboard": False,
    }
    save_model = options.pop("save_model", True)
    trainer = Trainer(model, loader_of(), loader_of(), device=device, **(settings | options))
    trainer.result = trainer.fit(save_model=save_model)
    return model, trainer


@pytest.mark.parametrize(("first", "second"), [("cpu:2", "cpu"), ("cpu", "cpu:3")])
def test_resuming_on_another_number_of_devices_has_the_same_result(tmp_path, first, second):
    whole, reference = trained(None, "cpu")
    trained(tmp_path, first, max_steps=6, checkpoint_every_steps=3)
    resumed, trainer = trained(tmp_path, second, resume=True)
    for one, other in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)
    losses = [record["val_loss"] for record in trainer.history]
    assert losses[2:] == pytest.approx([record["val_loss"] for record in reference.history][2:], rel=1e-5)


def test_a_run_on_three_devices_resumes_bit_identically(tmp_path):
    whole, _ = trained(None, "cpu:3")
    trained(tmp_path, "cpu:3", max_steps=6, checkpoint_every_steps=3)
    resumed, _ = trained(tmp_path, "cpu:3", resume=True)
    assert torch.equal(resumed.weight, whole.weight)


@pytest.mark.parametrize("device", ["cpu", "cpu:2"])
def test_checkpoints_and_weights_have_the_models_own_parameter_names(tmp_path, device):
    model, _ = trained(tmp_path, device, epochs=1, monitor="loss")
    saved = load_training(tmp_path / "checkpoint" / "last.pt")
    own = list(model.state_dict())
    assert list(saved["model"]) == list(saved["best_weights"]) == own  # DDP would add "module."
    assert sorted(load(tmp_path / "model.safetensors")) == sorted(own)


def test_resuming_a_finished_run_trains_no_further(tmp_path):
    model, trainer = trained(tmp_path, "cpu")
    again, resumed = trained(tmp_path, "cpu", resume=True)
    assert resumed.history == trainer.history
    assert torch.equal(again.weight, model.weight)


def test_a_finished_run_can_be_resumed_with_more_epochs(tmp_path):
    trained(tmp_path, "cpu", epochs=2)
    longer, trainer = trained(tmp_path, "cpu", epochs=4, resume="auto")
    whole, _ = trained(None, "cpu")
    assert len(trainer.history) == 4
    assert torch.equal(longer.weight, whole.weight)


def ruin(optimizer):
    """Make everything worse from the third epoch on."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0 if epoch < 2 else 1e6)


def test_the_best_weights_survive_an_interruption(tmp_path):
    first, _ = trained(tmp_path, "cpu", monitor="loss", scheduler=ruin, epochs=2)
    resumed, trainer = trained(tmp_path, "cpu", monitor="loss", scheduler=ruin, epochs=4, resume=True)
    assert trainer.history[-1]["val_loss"] > 10
    assert trainer.best.epoch == 2
    assert torch.equal(resumed.weight, first.weight)


@pytest.mark.parametrize("device", ["cpu", "cpu:2"])
def test_resuming_into_another_folder_keeps_the_best_weights(tmp_path, device):
    first, before = trained(tmp_path / "A", device, monitor="loss", scheduler=ruin, epochs=2)
    weights = first.weight.clone()
    (tmp_path / "B").mkdir()
    trained(tmp_path / "B", "cpu", epochs=1, lr=1e-3)  # what lies there is another run's
    resumed, trainer = trained(
        tmp_path / "B", device, monitor="loss", scheduler=ruin, epochs=3, resume=tmp_path / "A", save_model=False
    )
    assert trainer.best == before.best
    assert torch.equal(resumed.weight, weights)
    assert trainer.evaluate(loader_of())["loss"] == pytest.approx(trainer.best.results["loss"], rel=1e-6)
    assert len(trainer.history) == 3
    log = (tmp_path / "B" / "log.txt").read_text()
    assert log.count("resumed: ") == 1
    assert log.count("epoch 3/3") == 1
    assert "epoch 1/1" not in log
    assert not (tmp_path / "B" / "model.safetensors").exists()


@pytest.mark.parametrize("changed", ["lost", "monitor"])
def test_a_best_evaluation_without_its_weights_is_dropped_with_a_warning(tmp_path, changed, caplog):
    trained(tmp_path, "cpu", monitor="loss", scheduler=ruin, epochs=2)
    path = tmp_path / "checkpoint" / "last.pt"
    if changed == "lost":
        state = load_training(path)
        save_training(path, {name: value for name, value in state.items() if name != "best_weights"})
    monitor = "loss" if changed == "lost" else None
    _, trainer = trained(tmp_path, "cpu", monitor=monitor, scheduler=ruin, epochs=3, resume=True)
    assert "monitor=" in caplog.text
    assert trainer.best is None or trainer.best.epoch == 3
    assert trainer.result.validation["loss"] == pytest.approx(trainer.evaluate(loader_of())["loss"], rel=1e-6)
    assert trainer.result.validation["loss"] == trainer.history[-1]["val_loss"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"scheduler": "onecycle"}, {"scheduler": "cosine"}),
        ({"scheduler": None}, {"scheduler": "cosine"}),
        ({"scheduler": "cosine"}, {"scheduler": None}),
        ({"scheduler": "cosine"}, {"scheduler": "cosine", "scheduler_interval": "step"}),
    ],
)
def test_resuming_with_another_schedule_is_refused_and_changes_nothing(tmp_path, first, second):
    trained(tmp_path, "cpu", max_steps=6, **first)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=r"this Trainer's has .*begin a new run"):
        trained(tmp_path, "cpu", resume=True, **second)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_new_run_keeps_the_files_of_another_and_does_not_use_them(tmp_path, caplog):
    class Stop(Callback):
        def on_step_end(self, state):
            if state.step:
                raise KeyboardInterrupt

    trained(tmp_path, "cpu")
    weights, records = load(tmp_path / "model.safetensors"), (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, "cpu", callbacks=[Stop()])
    (aside,) = tmp_path.glob("before-*")
    assert str(aside) in caplog.text
    assert (aside / "metrics.jsonl").read_bytes() == records
    assert all(torch.equal(one, weights[name]) for name, one in load(aside / "model.safetensors").items())
    assert not (tmp_path / "model.safetensors").exists()
    with pytest.raises(CheckpointError, match="no checkpoint"):
        trained(tmp_path, "cpu", resume=True)
    assert len(trained(tmp_path, "cpu", resume="auto", epochs=1)[1].history) == 1
    assert list(tmp_path.glob("before-*")) == [aside]  # the interrupted run had nothing to lose
    trained(tmp_path, "cpu", resume=aside, epochs=5)
    assert len(list(tmp_path.glob("before-*"))) == 2


def test_the_log_keeps_that_a_run_was_resumed(tmp_path):
    class Stop(Callback):
        def on_step_end(self, state):
            if state.step == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, "cpu", checkpoint_every_steps=1, callbacks=[Stop()])
    trained(tmp_path, "cpu", resume=True)  # no epoch was recorded yet
    log = (tmp_path / "log.txt").read_text()
    assert log.count("devices: ") == 2
    assert "resumed: " in log
    assert "after 1 steps, in epoch 1" in log


def test_a_checkpoint_that_is_not_a_trainers_is_refused_with_a_remedy(tmp_path):
    save_training(tmp_path / "own.pt", {"model": torch.nn.Linear(5, 3), "epoch": 3})
    with pytest.raises(CheckpointError, match=r"it has model, epoch and lacks .*duoka\.load"):
        trained(None, "cpu", resume=tmp_path / "own.pt")


def test_a_checkpoint_of_another_model_is_refused_by_name_and_shape(tmp_path):
    trained(tmp_path, "cpu", epochs=1)
    trainer = Trainer(
        torch.nn.Linear(5, 4),
        loader_of(),
        loss=torch.nn.CrossEntropyLoss(),
        device="cpu",
        out_dir=tmp_path,
        resume=True,
    )
    with pytest.raises(CheckpointError, match="weight"):
        trainer.fit()


def test_resuming_without_a_checkpoint_is_an_error_unless_it_is_automatic(tmp_path):
    with pytest.raises(CheckpointError, match="resume='auto'"):
        trained(tmp_path, "cpu", resume=True)
    trained(tmp_path, "cpu", resume="auto", epochs=1)
    with pytest.raises(ConfigError, match="out_dir"):
        trained(None, "cpu", resume=True)


def worsening(optimizer):
    """Climb from the third epoch on."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0 if epoch < 2 else -1.0)


def test_an_early_stopped_run_stays_stopped_when_resumed(tmp_path):
    options = {"optimizer_options": {}, "scheduler": worsening, "early_stop_patience": 2, "epochs": 9}
    model, stopped = trained(tmp_path, "cpu", **options)
    assert len(stopped.history) == 4
    again, resumed = trained(tmp_path, "cpu", resume=True, **options)
    assert resumed.history == stopped.history
    assert resumed.stopped == stopped.stopped
    assert torch.equal(again.weight, model.weight)
    _, patient = trained(tmp_path, "cpu", resume=True, **{**options, "early_stop_patience": 3})
    assert len(patient.history) == 5


def test_evaluating_an_incomplete_epoch_does_not_count_for_patience(tmp_path):
    options = {"optimizer_options": {}, "scheduler": worsening, "early_stop_patience": 2}
    _, whole = trained(None, "cpu", epochs=9, **options)
    trained(tmp_path, "cpu", epochs=9, max_steps=10, **options)  # the middle of epoch 3, of 4 steps
    _, resumed = trained(tmp_path, "cpu", epochs=9, resume=True, **options)
    assert [record["step"] for record in whole.history] == [4, 8, 12, 16]
    assert [record["step"] for record in resumed.history] == [4, 8, 12, 16]


@pytest.mark.parametrize("scheduler", ["cosine", "onecycle", "multistep"])
def test_a_schedule_does_not_continue_past_its_planned_end(tmp_path, scheduler):
    trained(tmp_path, "cpu", scheduler=scheduler, epochs=2)
    unit = (8, 16, "steps") if scheduler == "onecycle" else (2, 4, "epochs")
    with pytest.raises(CheckpointError, match="planned for {} {u}.* {} {u}.*new run".format(*unit[:2], u=unit[2])):
        trained(tmp_path, "cpu", scheduler=scheduler, epochs=4, resume=True)


def test_a_schedule_of_given_length_continues_with_more_epochs(tmp_path):
    options = {"scheduler": "cosine", "scheduler_options": {"T_max": 4}}
    trained(tmp_path, "cpu", epochs=2, **options)
    longer, _ = trained(tmp_path, "cpu", epochs=4, resume=True, **options)
    whole, _ = trained(None, "cpu", epochs=4, **options)
    assert torch.equal(longer.weight, whole.weight)


@pytest.mark.parametrize("damaged", [True, False])
def test_a_checkpoint_that_rank_0_cannot_read_stops_every_rank(tmp_path, damaged):
    path = tmp_path / "last.pt"
    if damaged:
        path.write_bytes(b"no checkpoint")

    def on_each_rank() -> str:
        data = torch.utils.data.TensorDataset(torch.zeros(4, 5), torch.zeros(4, dtype=torch.long))
        trainer = Trainer(
            torch.nn.Linear(5, 3),
            torch.utils.data.DataLoader(data, batch_size=2),
            loss=torch.nn.CrossEntropyLoss(),
            device="cpu",
            resume=path,
            verbose=False,
        )
        try:
            trainer.fit()
        except CheckpointError as error:
            return str(error)
        return ""

    first, second = launch(on_each_rank, devices="cpu:2", returns="all", timeout_s=20)
    assert "last.pt" in first
    assert second == f"rank 0: CheckpointError: {first}"
