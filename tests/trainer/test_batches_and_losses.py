"""Forms of batches, losses, metrics and predictions."""

from __future__ import annotations

import functools
import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, TensorDataset

from duoka.errors import ConfigError, DataError
from duoka.trainer import Trainer

pytestmark = pytest.mark.usefixtures("pickle_by_value")

DEVICES = ("cpu", "cpu:2", "cpu:3")


def tensors(samples: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(samples, 6, generator=generator), torch.randint(3, (samples,), generator=generator)


class Dicts(Dataset):
    def __init__(self, target: str) -> None:
        features, labels = tensors()
        self.columns = {"features": features, target: labels}

    def __len__(self) -> int:
        return len(self.columns["features"])

    def __getitem__(self, index: int) -> dict:
        return {name: column[index] for name, column in self.columns.items()}


class OwnLoss(nn.Module):
    """A model in the manner of transformers: it returns its own loss, and has methods that take a batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(6, 3)

    def forward(self, features: torch.Tensor, labels: torch.Tensor | None = None) -> SimpleNamespace:
        logits = self.layer(features)
        loss = None if labels is None else functional.cross_entropy(logits, labels)
        return SimpleNamespace(loss=loss, logits=logits)

    def calculate_loss(self, batch: dict) -> torch.Tensor:
        return functional.cross_entropy(self.layer(batch["features"]), batch["labels"])

    def classes(self, batch: dict) -> torch.Tensor:
        return self.layer(batch["features"]).argmax(-1)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(6, 3)

    def forward(self, left: torch.Tensor, right: dict) -> torch.Tensor:
        return self.layer(left + right["shift"])


def fitted(model: nn.Module, loader, device: str, **options) -> nn.Module:
    options = {"optimizer": "sgd", "lr": 0.1, "epochs": 2, "batch_size_means": "global", "verbose": False} | options
    Trainer(model, loader, device=device, **options).fit()
    return model


def reference() -> torch.Tensor:
    torch.manual_seed(1)
    layer = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(2):
        for features, target in zip(*(tensor.split(4) for tensor in tensors()), strict=True):
            functional.cross_entropy(layer(features), target).backward()
            optimizer.step()
            optimizer.zero_grad()
    return layer.weight


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("loss", [None, "calculate_loss"])
def test_a_models_own_loss_on_dicts_trains_on_any_number_of_devices(device, loss):
    model = fitted(OwnLoss(), DataLoader(Dicts("labels"), batch_size=4), device, loss=loss)
    assert torch.allclose(model.layer.weight, reference(), atol=1e-6)


def test_the_target_of_a_dict_has_a_usual_key_or_target_key():
    class Plain(OwnLoss):
        def forward(self, features):
            return self.layer(features)

    for name, options in (("label", {}), ("y", {}), ("answer", {"target_key": "answer"})):
        loader = DataLoader(Dicts(name), batch_size=4)
        model = fitted(Plain(), loader, "cpu", loss=functional.cross_entropy, **options)
        assert torch.allclose(model.layer.weight, reference(), atol=1e-6)
    with pytest.raises(DataError, match=r"answer.*target_key="):
        fitted(Plain(), DataLoader(Dicts("answer"), batch_size=4), "cpu", loss=functional.cross_entropy)


@pytest.mark.parametrize("device", ["cpu", "cpu:2"])
def test_nested_batches_reach_the_model_in_their_structure(device):
    features, target = tensors()
    batches = [
        (left, {"shift": torch.zeros_like(left)}, label)
        for left, label in zip(features.split(4), target.split(4), strict=True)
    ]
    model = fitted(TwoInputs(), batches, device, loss=nn.CrossEntropyLoss())
    assert torch.allclose(model.layer.weight, reference(), atol=1e-6)


def test_predictions_are_in_sample_order_on_any_number_of_devices():
    features, target = tensors()
    torch.manual_seed(1)
    model = nn.Linear(6, 3)
    with torch.no_grad():
        expected = model(features)
    for device in DEVICES:
        for data in (TensorDataset(features), TensorDataset(features, target)):
            predictions = Trainer(model, device=device).predict(DataLoader(data, batch_size=3))
            assert torch.allclose(predictions, expected, atol=1e-6)


class Boxes(nn.Module):
    """Returns as many rows for a sample as its first feature says."""

    def __init__(self, as_dict: bool) -> None:
        super().__init__()
        self.as_dict, self.layer = as_dict, nn.Linear(1, 1)

    def forward(self, features):
        boxes = [row[:1].expand(int(row[0]), 4) for row in features]
        return [{"boxes": one, "name": "box"} for one in boxes] if self.as_dict else boxes


@pytest.mark.parametrize("rows", [(3, 1, 2, 0, 5), (2, 2, 2, 2, 2), (2, 3, 2, 1, 1), (2, 2, 2, 2)])
@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize("batch_size", [2, 3, 4])
def test_lists_with_one_item_per_sample_become_one_list(rows, as_dict, batch_size):
    data = DataLoader(TensorDataset(torch.tensor(rows, dtype=torch.float32)[:, None]), batch_size=batch_size)
    for device in ("cpu", "cpu:2"):
        predictions = Trainer(Boxes(as_dict), device=device).predict(data)
        boxes = [one["boxes"] if as_dict else one for one in predictions]
        assert [tuple(one.shape) for one in boxes] == [(count, 4) for count in rows]


def test_a_list_of_columns_stays_a_list_of_columns():
    class Heads(nn.Linear):
        def forward(self, features):
            return [super().forward(features), features]

    for device, batch_size in itertools.product(("cpu", "cpu:2"), (2, 4)):
        data = DataLoader(TensorDataset(torch.randn(8, 3)), batch_size=batch_size)
        assert [tuple(one.shape) for one in Trainer(Heads(3, 2), device=device).predict(data)] == [(8, 2), (8, 3)]


def test_a_method_of_the_model_predicts_and_metrics_see_its_predictions():
    torchmetrics = pytest.importorskip("torchmetrics")
    loader = DataLoader(Dicts("labels"), batch_size=4)
    model = OwnLoss()
    trainer = Trainer(
        model,
        loss="calculate_loss",
        predict_fn="classes",
        metrics=[torchmetrics.classification.MulticlassAccuracy(3, average="micro")],
        device="cpu:2",
    )
    features, target = tensors()
    with torch.no_grad():
        classes = model.layer(features).argmax(-1)
    assert torch.equal(trainer.predict(loader), classes)
    results = trainer.evaluate(loader)
    assert results["MulticlassAccuracy"] == pytest.approx(float((classes == target).float().mean()))


def test_metrics_of_a_model_with_its_own_loss_get_its_logits():
    torchmetrics = pytest.importorskip("torchmetrics")
    loader = DataLoader(Dicts("labels"), batch_size=4)
    trainer = Trainer(OwnLoss(), metrics={"accuracy": torchmetrics.classification.MulticlassAccuracy(3)}, device="cpu")
    results = trainer.evaluate(loader)
    assert set(results) == {"loss", "accuracy"}


def test_a_loss_with_parameters_trains_them_on_any_number_of_devices():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, output, target):
            return functional.cross_entropy(output * self.scale, target)

    losses = []
    for device in ("cpu", "cpu:2"):
        torch.manual_seed(0)
        losses.append(Scaled())
        fitted(nn.Linear(6, 3), DataLoader(TensorDataset(*tensors()), batch_size=4), device, loss=losses[-1])
    assert float(losses[0].scale.detach()) != 1.0
    assert torch.allclose(losses[0].scale, losses[1].scale, atol=1e-6)


def test_an_output_that_is_not_a_loss_raises_an_error_with_a_remedy():
    loader = DataLoader(TensorDataset(*tensors()), batch_size=4)
    with pytest.raises(ConfigError, match="must be one number"):
        fitted(TwoReturns(), DataLoader(TensorDataset(tensors()[0]), batch_size=4), "cpu")
    with pytest.raises(ConfigError, match="no_such_method"):
        fitted(nn.Linear(6, 3), loader, "cpu", loss="no_such_method")
    with pytest.raises(DataError, match="no target"):
        fitted(nn.Linear(6, 3), [tensors()[0]], "cpu", loss=functional.cross_entropy)


class TwoReturns(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, features):
        return self.layer(features)


@pytest.mark.parametrize("kind", ["moments", "wrapper", "composition"])
def test_metrics_of_every_kind_are_the_same_on_any_number_of_devices(kind):
    torchmetrics = pytest.importorskip("torchmetrics")
    features, _ = tensors()
    data = TensorDataset(features, features.sum(1))
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 1), nn.Flatten(0))
    metrics = {
        "moments": lambda: {"r": torchmetrics.PearsonCorrCoef(), "r2": torchmetrics.R2Score()},
        "wrapper": lambda: torchmetrics.MinMaxMetric(torchmetrics.MeanSquaredError()),
        "composition": lambda: {"sum": torchmetrics.MeanSquaredError() + torchmetrics.MeanAbsoluteError()},
    }[kind]
    results = [
        Trainer(model, loss=nn.MSELoss(), metrics=metrics(), device=device).evaluate(DataLoader(data, batch_size=4))
        for device in DEVICES
    ]
    assert len(results[0]) >= 2
    for other in results[1:]:
        assert {name: f"{value:.5g}" for name, value in other.items()} == {
            name: f"{value:.5g}" for name, value in results[0].items()
        }


def column_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(output, target).reshape(1)


def weighted_column_loss(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return functional.cross_entropy(output, target, reduction="sum").reshape(1), torch.tensor([len(target)])


@pytest.mark.parametrize("loss", [column_loss, weighted_column_loss])
def test_a_loss_of_one_element_is_reported_as_a_scalar(loss):
    histories = []
    for function in (functional.cross_entropy, loss):
        torch.manual_seed(1)
        loader = DataLoader(TensorDataset(*tensors()), batch_size=4)
        options = {"loss": function, "optimizer": "sgd", "lr": 0.1, "epochs": 2, "device": "cpu", "verbose": False}
        trainer = Trainer(nn.Linear(6, 3), loader, loader, **options)
        trainer.fit()
        histories.append([(record["train_loss"], record["val_loss"]) for record in trainer.history])
    for one, other in zip(*histories, strict=True):
        assert one == pytest.approx(other, rel=1e-6)


def test_a_loss_of_many_numbers_is_refused_in_training_and_evaluation():
    features, _ = tensors()
    loader = DataLoader(TensorDataset(features, features[:, :3]), batch_size=4)
    trainer = Trainer(nn.Linear(6, 3), loader, loss=nn.MSELoss(reduction="none"), device="cpu", verbose=False)
    for start in (trainer.fit, lambda: trainer.evaluate(loader)):
        with pytest.raises(ConfigError, match=r"shape \(4, 3\).*one number"):
            start()


@pytest.mark.parametrize(
    "loss",
    [nn.MSELoss(reduction="sum"), functools.partial(functional.cross_entropy, reduction="sum")],
)
def test_a_torch_loss_with_reduction_sum_is_refused_before_training(loss):
    with pytest.raises(ConfigError, match=r'with reduction=.sum..*reduction="mean".*\(sum, weight\)'):
        Trainer(nn.Linear(6, 3), loss=loss, device="cpu")


class OwnSum(OwnLoss):
    """A model that returns its own loss as ``(sum, weight)``."""

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, int]:
        return functional.cross_entropy(self.layer(features), labels, reduction="sum"), torch.tensor([len(labels)])


@pytest.mark.parametrize("device", ["cpu", "cpu:2"])
def test_a_models_own_sum_and_weight_are_its_loss_in_evaluation_too(device):
    loader = DataLoader(Dicts("labels"), batch_size=4)
    expected = Trainer(OwnLoss(), device="cpu").evaluate(loader)
    assert Trainer(OwnSum(), device=device).evaluate(loader) == pytest.approx(expected, rel=1e-6)
    model = fitted(OwnSum(), loader, device)
    assert torch.allclose(model.layer.weight, reference(), atol=1e-6)


def test_a_tuple_of_loss_and_logits_is_not_a_sum_and_its_weight():
    class Pair(OwnLoss):
        def forward(self, features, labels):
            output = super().forward(features, labels)
            return output.loss, output.logits

    with pytest.raises(ConfigError, match="carries no loss"):
        fitted(Pair(), DataLoader(Dicts("labels"), batch_size=4), "cpu")
