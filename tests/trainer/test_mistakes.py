"""Common mistakes, each with an error that names the remedy."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from duoka.errors import CheckpointError, ConfigError, DataError, StorageError
from duoka.trainer import Callback, Trainer
from support.tiny_training import loader, trainer_of


class Untouched(nn.Linear):
    """Fails when it is called."""

    def forward(self, features):  # noqa: ARG002
        raise AssertionError("training began")


def test_model_path_is_checked_before_the_first_step(tmp_path):
    trainer = trainer_of(model=Untouched(5, 2))
    with pytest.raises(ConfigError, match=r"suffix '\.bin'"):
        trainer.fit(model_path=tmp_path / "m.bin")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot write"):
        trainer.fit(model_path=tmp_path / "file" / "m.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("as_what", ["save_model", "model_path"])
def test_data_given_to_fit_are_an_error_that_names_their_place(as_what: str) -> None:
    loader = DataLoader(TensorDataset(torch.ones(4, 1)))
    with pytest.raises(ConfigError, match=r"got a DataLoader; .*Trainer\(model, train_data, eval_data"):
        trainer_of().fit(**{as_what: loader})


@pytest.mark.parametrize("device", ["cpu", "cpu:2"])
def test_another_optimizer_cannot_resume_a_checkpoint(tmp_path, device):
    trainer_of(out_dir=tmp_path, device=device, epochs=1).fit()
    with pytest.raises(CheckpointError, match=r"AdamW, this Trainer has SGD.*optimizer='adamw'"):
        trainer_of(out_dir=tmp_path, device=device, resume=True, epochs=2, optimizer="sgd").fit()


@pytest.mark.parametrize("limit", [{"epochs": 1}, {"epochs": 5, "max_steps": 3}])
def test_resuming_a_finished_run_logs_that_nothing_is_left(tmp_path, capsys, limit):
    trainer_of(out_dir=tmp_path, **limit).fit()
    capsys.readouterr()
    trainer_of(out_dir=tmp_path, resume=True, verbose=True, **limit).fit()
    expected = "all 3 steps of max_steps are done" if "max_steps" in limit else "all 1 epochs are done"
    assert f"after 3 steps, and nothing is left to train: {expected}" in capsys.readouterr().out


def test_a_model_without_trainable_parameters_is_an_error():
    with pytest.raises(ConfigError, match=r"requires_grad.*model\.requires_grad_"):
        trainer_of(model=nn.Linear(5, 2).requires_grad_(False)).fit()


def test_a_schedule_may_be_a_class_with_its_options():
    trainer = trainer_of(
        optimizer="sgd",
        lr=1.0,
        scheduler=torch.optim.lr_scheduler.StepLR,
        scheduler_options={"step_size": 1, "gamma": 0.5},
        epochs=3,
    )
    trainer.fit()
    assert [record["lr"] for record in trainer.history] == [1.0, 0.5, 0.25]
    with pytest.raises(ConfigError, match=r"scheduler=StepLR with scheduler_options=\{\}: .*step_size"):
        trainer_of(scheduler=torch.optim.lr_scheduler.StepLR).fit()


class Named(nn.Linear):
    """Has its loss as a method."""

    def training_loss(self, batch):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"loss": nn.CrossEntropyLoss},
            r"loss is the class CrossEntropyLoss itself; call it: loss=CrossEntropyLoss\(\)",
        ),
        ({"loss": 3}, "loss=3 cannot be called"),
        ({"loss": "trainin_loss", "model": Named(5, 2)}, r"trainin_loss.*did you mean 'training_loss'\?"),
        ({"predict_fn": "forwrd"}, r"predict_fn='forwrd'.*did you mean 'forward'\?"),
        ({"callbacks": print}, r"callbacks has <built-in function print>; give a list"),
        ({"callbacks": [Callback]}, r"callbacks has the class Callback itself; call it"),
        ({"model": nn.Linear}, r"model is the class Linear itself; call it: Linear\(\.\.\.\)"),
    ],
)
def test_wrong_objects_are_found_in_the_constructor(options, message):
    with pytest.raises(ConfigError, match=message):
        trainer_of(**options)


class Conditional(nn.Linear):
    """Takes all of a batch, and returns no loss."""

    def forward(self, features, target):  # noqa: ARG002
        return super().forward(features)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": lambda output, target: nn.functional.cross_entropy(output, target).item()}, r"without \.item\(\)"),
        ({"loss": None}, r"no loss, .*its forward takes \(input\)"),
        (
            {"loss": None, "model": Conditional(5, 2)},
            r"returned a tensor of shape \(4, 2\)",
        ),
    ],
)
def test_a_missing_loss_is_found_at_the_first_batch(options, message):
    with pytest.raises(ConfigError, match=message):
        trainer_of(**options).fit()


def test_a_type_error_inside_the_users_model_keeps_its_message():
    class Broken(nn.Linear):
        def forward(self, features, target):  # noqa: ARG002
            return 1 + "one"

    with pytest.raises(TypeError, match="unsupported operand"):
        trainer_of(loss=None, model=Broken(5, 2)).fit()


@pytest.mark.parametrize("device", ["cpu", "cpu:2"])
def test_a_shuffled_loader_gives_predictions_in_data_set_order(device):
    trainer = trainer_of(device=device)
    shuffled = loader(shuffle=True)
    expected = trainer.model(shuffled.dataset.tensors[0])
    assert torch.allclose(trainer.predict(shuffled), expected, atol=1e-6)
    assert type(shuffled.sampler).__name__ == "RandomSampler"


def rows(count: int, width: int = 5) -> TensorDataset:
    return TensorDataset(torch.zeros(count, width), torch.zeros(count, dtype=torch.long))


@pytest.mark.parametrize("device", ["cpu", "cpu:2"])
def test_batch_norm_on_one_sample_raises_an_error_with_a_remedy(device):
    model = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))
    data = DataLoader(rows(3 if device == "cpu:2" else 5), batch_size=4)
    with pytest.raises(DataError, match=r"batch norm cannot be trained on one sample.*drop_last=True"):
        trainer_of(model=model, train_data=data, device=device, batch_size_means="global").fit()


class Longer(IterableDataset):
    """Tells fewer samples than it has."""

    def __len__(self):
        return 8

    def __iter__(self):
        yield from rows(14)


def test_a_cycle_shorter_than_the_data_stays_at_its_end():
    data = DataLoader(Longer(), batch_size=4)
    trainer = trainer_of(train_data=data, scheduler="onecycle", optimizer="sgd", lr=0.1, epochs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit()
    assert trainer.history[-1]["step"] == 4
    assert trainer.history[-1]["lr"] < 1e-3


def test_lbfgs_and_lazy_modules_are_refused_with_a_remedy():
    with pytest.raises(ConfigError, match=r"LBFGS .*duoka\.launch"):
        trainer_of(optimizer=torch.optim.LBFGS).fit()
    with warnings.catch_warnings():  # torch says once in a process that these are new
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.LazyLinear(2))
    with pytest.raises(ConfigError, match=r"without a shape \(0\.weight, 0\.bias\); call it once"):
        trainer_of(model=model).fit()


class Odd(nn.Linear):
    """Returns a row for each position, or a number without a batch dimension."""

    def __init__(self, squeezes: bool) -> None:
        super().__init__(1, 1)
        self.squeezes = squeezes

    def forward(self, features):
        output = super().forward(features.unsqueeze(-1))
        return output.squeeze() if self.squeezes else output


def test_predictions_of_different_shapes_are_an_error_with_a_remedy():
    with pytest.raises(DataError, match=r"^predictions of different batches.*predict_fn="):
        Trainer(Odd(False), device="cpu").predict([torch.zeros(4, 5), torch.zeros(4, 7)])
    with pytest.raises(DataError, match=r"single number without a batch dimension.*squeeze\(-1\)"):
        Trainer(Odd(True), device="cpu").predict([torch.zeros(4, 1), torch.zeros(1, 1)])
