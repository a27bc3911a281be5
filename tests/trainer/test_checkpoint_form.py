"""Training checkpoints that were edited by hand: one message with the key's path, before anything is changed."""

import copy

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from duoka import Trainer, checkpoint
from duoka.errors import CheckpointError

FEATURES = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
DATA = DataLoader(TensorDataset(FEATURES, FEATURES[:, :2]), batch_size=4)


STATE = {"step": torch.zeros(()), "exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)}


def fit(folder, resume) -> None:
    options = {"lr": 0.01, "scheduler": "onecycle", "epochs": 2, "verbose": False}
    model = torch.nn.Linear(4, 2)
    Trainer(model, DATA, loss=torch.nn.MSELoss(), device="cpu", out_dir=folder, resume=resume, **options).fit()


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("run")
    fit(folder, resume=False)
    return checkpoint.load_training(folder / "checkpoint" / "last.pt")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model", [], "model is []; it must be a mapping of keys and values"),
        ("position.epoch", "1", "position.epoch is '1'; it must be an integer"),
        ("position.samples", -1, "position.samples is -1; it must be a count"),
        ("state.history.0.epoch", None, "state.history[0].epoch is None; it must be an integer"),
        ("state.best", {"value": 1.0}, "state.best has no key 'epoch'"),
        ("ranks", [], "ranks is empty"),
        ("ranks.0.rng.torch", torch.zeros(3), "ranks[0].rng is no state of the random generators"),
        ("ranks.0.rng.python.words", torch.zeros(3).long(), "ranks[0].rng is no state of the random generators"),
        ("ranks.0.loss_meter", [1.0, "x"], "ranks[0].loss_meter is [1.0, 'x']"),
        ("optimizer.state.elsewhere", STATE, "has values of elsewhere, which is in none of its groups"),
        ("schedule.peak_lrs", [0.1, 0.1], "schedule.peak_lrs is [0.1, 0.1]; it must be a list of 1"),
        ("schedule.scheduler.last_epoch", "3", "schedule.scheduler.last_epoch is '3'; it must be an integer"),
        ("optimizer.param_groups.0.lr", "high", "optimizer.param_groups[0].lr is 'high'"),
        (
            "optimizer.state.model.weight.exp_avg",
            torch.zeros(3),
            "optimizer.state.model.weight.exp_avg has the shape (3,)",
        ),
        (
            "optimizer.state.model.weight.exp_avg",
            None,
            "optimizer.state.model.bias differs from other parameters' state",
        ),
    ],
)
def test_the_key_that_does_not_fit_is_named(saved, tmp_path, path, value, message):
    changed = copy.deepcopy(saved)
    keys = path.split(".") if "model.weight" not in path else ["optimizer", "state", "model.weight", "exp_avg"]
    *above, last = [int(key) if key.isdigit() else key for key in keys]
    holder = changed
    for key in above:
        holder = holder[key]
    holder[last] = value
    torch.save({"format": "duoka.training", "version": 1, "state": changed}, tmp_path / "changed.pt")
    with pytest.raises(CheckpointError) as caught:
        fit(tmp_path / "next", resume=str(tmp_path / "changed.pt"))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "next").exists()


def test_a_checkpoint_that_nothing_has_changed_continues(saved, tmp_path):
    torch.save({"format": "duoka.training", "version": 1, "state": saved}, tmp_path / "same.pt")
    fit(tmp_path / "next", resume=str(tmp_path / "same.pt"))
