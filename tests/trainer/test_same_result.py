"""A fit takes the same steps on one, two and three devices as a plain PyTorch loop does on one."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from duoka.errors import ConfigError, DataError
from duoka.trainer import Trainer
from duoka.trainer.loss_reduction import reduce_loss

pytestmark = pytest.mark.usefixtures("pickle_by_value")

STEPS = 10
DEVICES = ("cpu", "cpu:2", "cpu:3")


def classifier() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4)).double()


def labelled(samples: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(samples)
    features = torch.randn(samples, 6, generator=generator, dtype=torch.float64)
    return TensorDataset(features, torch.randint(4, (samples,), generator=generator))


def relative_difference(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a - b).detach().norm() / b.detach().norm()) for a, b in pairs)


def raw_loop(model: nn.Module, loader: DataLoader, accumulate: int) -> nn.Module:
    """The reference: the mean over all samples of an accumulation window, the last one of an epoch being shorter."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=0.01)
    steps = 0
    while steps < STEPS:
        batches = list(loader)
        for start in range(0, len(batches), accumulate):
            window = batches[start : start + accumulate]
            samples = sum(len(target) for _, target in window)
            for features, target in window:
                (functional.cross_entropy(model(features), target, reduction="sum") / samples).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
            if steps == STEPS:
                break
    return model


def fitted(model: nn.Module, loader: DataLoader, device: str, **options) -> tuple[nn.Module, Trainer]:
    settings = {
        "loss": nn.CrossEntropyLoss(),
        "optimizer": "sgd",
        "optimizer_options": {"momentum": 0.9},
        "lr": 0.2,
        "weight_decay": 0.01,
        "max_grad_norm": 0.5,
        "batch_size_means": "global",
        "epochs": 100,
        "max_steps": STEPS,
        "verbose": False,
    }
    trainer = Trainer(model, loader, device=device, **(settings | options))
    trainer.fit()
    return model, trainer


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("samples", [11, 12, 64])
def test_one_two_and_three_devices_take_the_steps_of_a_raw_loop(samples, accumulate):
    loader = DataLoader(labelled(samples), batch_size=4)
    reference = raw_loop(classifier(), loader, accumulate)
    for device in DEVICES:
        model, trainer = fitted(classifier(), loader, device, gradient_accumulation_steps=accumulate)
        assert trainer.history[-1]["step"] == STEPS
        assert relative_difference(model, reference) < 1e-12, device


def test_shuffled_data_have_the_same_order_on_any_number_of_devices():
    loader = DataLoader(labelled(11), batch_size=4, shuffle=True)
    one, *others = [fitted(classifier(), loader, device)[0] for device in DEVICES]
    plain = fitted(classifier(), DataLoader(labelled(11), batch_size=4), "cpu")[0]
    assert relative_difference(one, plain) > 1e-3  # the order matters
    for other in others:
        assert relative_difference(other, one) < 1e-12


def test_a_batch_smaller_than_the_number_of_devices_takes_the_same_step():
    loader = DataLoader(labelled(4), batch_size=2)
    reference = raw_loop(classifier(), loader, 1)
    model, _ = fitted(classifier(), loader, "cpu:3")
    assert relative_difference(model, reference) < 1e-12


def test_batch_per_device_makes_one_step_of_a_batch_a_device():
    samples = labelled(11)
    reference, _ = fitted(classifier(), DataLoader(samples, batch_size=6), "cpu")
    model, trainer = fitted(classifier(), DataLoader(samples, batch_size=3), "cpu:2", batch_size_means="per_device")
    assert trainer.history[0]["step"] == 2
    assert relative_difference(model, reference) < 1e-12


LOSSES = {
    "ignored by default": (functional.cross_entropy, {}),
    "ignored and weighed": (
        nn.CrossEntropyLoss(ignore_index=1, weight=torch.tensor([1.0, 9.0, 5.0, 0.1]).double()),
        {},
    ),
    "smoothed": (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0, 0.1]).double(), label_smoothing=0.2), {}),
    "log-probabilities": (
        nn.NLLLoss(weight=torch.tensor([1.0, 2.0, 5.0, 0.1]).double()),
        {"gradient_accumulation_steps": 2},
    ),
    "options": (functools.partial(functional.cross_entropy, ignore_index=2), {"gradient_accumulation_steps": 2}),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_class_losses_average_over_the_global_batchs_counted_targets(kind):
    loss, options = LOSSES[kind]
    data = labelled(11)
    data.tensors[1][[0, 1, 5]] = -100 if kind in ("ignored by default", "smoothed") else 1
    loader = DataLoader(data, batch_size=6)
    raw = classifier()
    optimizer = torch.optim.SGD(raw.parameters(), lr=0.2)
    batches = [data[:]] if "gradient_accumulation_steps" in options else loader
    for _ in range(2):
        for features, target in batches:
            loss(raw(features), target).backward()
            optimizer.step()
            optimizer.zero_grad()
    settings = {"optimizer_options": {}, "weight_decay": None, "max_grad_norm": None, "epochs": 2, "max_steps": None}
    results = []
    for device in DEVICES:
        model, trainer = fitted(classifier(), loader, device, loss=loss, **settings, **options)
        assert relative_difference(model, raw) < 1e-12, device
        results.append((trainer.history[-1]["train_loss"], trainer.evaluate(loader)["loss"]))
    assert results[1] == pytest.approx(results[0], rel=1e-5)
    assert results[2] == pytest.approx(results[0], rel=1e-5)
    with torch.no_grad():
        whole = float(loss(raw(data.tensors[0]), data.tensors[1]))
    assert results[0][1] == pytest.approx(whole, rel=1e-5)


def test_targets_that_are_probabilities_are_a_mean_over_samples():
    probabilities = TensorDataset(labelled(11).tensors[0], functional.one_hot(labelled(11).tensors[1], 4).double())
    one, two = [fitted(classifier(), DataLoader(probabilities, batch_size=4), device)[0] for device in DEVICES[:2]]
    classes, _ = fitted(classifier(), DataLoader(labelled(11), batch_size=4), "cpu")
    assert relative_difference(two, one) < 1e-12
    assert relative_difference(one, classes) < 1e-12


def token_loss(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A mean over the tokens that count: those of class 0 do not."""
    counted = target != 0
    return functional.cross_entropy(output[counted], target[counted], reduction="sum"), counted.sum()


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_loss_of_sum_and_weight_has_the_gradient_of_the_global_mean(accumulate):
    loader = DataLoader(labelled(11), batch_size=4)
    reference = classifier()
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.2, momentum=0.9, weight_decay=0.01)
    batches = list(loader)
    steps = 0
    while steps < STEPS:
        for start in range(0, len(batches), accumulate):
            window = batches[start : start + accumulate]
            parts = [token_loss(reference(features), target) for features, target in window]
            (sum(total for total, _ in parts) / sum(weight for _, weight in parts)).backward()
            nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
            if steps == STEPS:
                break
    for device in DEVICES:
        model, _ = fitted(classifier(), loader, device, loss=token_loss, gradient_accumulation_steps=accumulate)
        assert relative_difference(model, reference) < 1e-12, device


@pytest.mark.filterwarnings("ignore:No (positive|negative) samples")
def test_evaluation_results_are_equal_to_the_last_digit_printed():
    torchmetrics = pytest.importorskip("torchmetrics")
    metrics = {
        "accuracy": torchmetrics.classification.MulticlassAccuracy(4, average="micro"),
        "f1": torchmetrics.classification.MulticlassF1Score(4),
        "auroc": torchmetrics.classification.MulticlassAUROC(4),
        "confusion": torchmetrics.classification.MulticlassConfusionMatrix(4),
    }
    for samples in (2, 11, 64):  # 2 samples leave ranks without one
        loader = DataLoader(labelled(samples), batch_size=4)
        model = classifier()
        results = [
            Trainer(model, loss=nn.CrossEntropyLoss(), metrics=metrics, device=device).evaluate(loader)
            for device in DEVICES
        ]
        with torch.no_grad():
            features, target = loader.dataset.tensors
            expected = float(functional.cross_entropy(model(features), target))
        assert results[0]["loss"] == pytest.approx(expected, rel=1e-6)
        for other in results[1:]:
            for name in ("loss", "accuracy", "f1", "auroc"):
                assert f"{other[name]:.6g}" == f"{results[0][name]:.6g}", (name, samples)
            assert torch.equal(other["confusion"], results[0]["confusion"])


def test_results_after_a_fit_are_equal_on_any_number_of_devices():
    torchmetrics = pytest.importorskip("torchmetrics")
    loader = DataLoader(labelled(64), batch_size=8, shuffle=True)
    accuracy = torchmetrics.classification.MulticlassAccuracy(4)
    records = []
    for device in DEVICES:
        trainer = Trainer(
            classifier(),
            loader,
            loader,
            loader,
            loss=nn.CrossEntropyLoss(),
            metrics=accuracy,
            batch_size_means="global",
            device=device,
            epochs=2,
            lr=0.01,
            monitor="loss",
            verbose=False,
        )
        validation, test = trainer.fit()
        assert f"{validation['loss']:.6g}" == f"{test['loss']:.6g}"
        names = ("train_loss", "val_loss", "val_MulticlassAccuracy", "step", "samples", "lr")
        records.append([[f"{record[name]:.6g}" for name in names] for record in trainer.history])
    assert records[0] == records[1] == records[2]


class WithUnused(nn.Module):
    """A module with a layer that its forward does not use."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.used = nn.Linear(6, 4)
        self.idle = nn.Linear(6, 4)
        self.double()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.used(features)


def test_unused_parameters_are_found_without_changing_the_result():
    loader = DataLoader(labelled(12), batch_size=4)
    one, _ = fitted(WithUnused(), loader, "cpu")
    two, _ = fitted(WithUnused(), loader, "cpu:2")
    assert relative_difference(two, one) < 1e-12


class Branches(nn.Module):
    """A second branch that takes part while ``first <= calls < last``."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.main, self.branch = nn.Linear(6, 4), nn.Linear(6, 4)
        self.first, self.last, self.calls = first, last, 0
        self.double()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        is_used = self.first <= self.calls < self.last
        self.calls += self.training
        return self.main(features) + (self.branch(features) if is_used else 0)


@pytest.mark.parametrize(("first", "last", "found"), [(2, 99, None), (99, 99, None), (0, 3, True), (2, 4, None)])
def test_a_branch_that_is_not_always_used_takes_the_same_steps(first, last, found):
    loader = DataLoader(labelled(12), batch_size=4)
    one, _ = fitted(Branches(first, last), loader, "cpu", find_unused_parameters=found)
    two, _ = fitted(Branches(first, last), loader, "cpu:2", find_unused_parameters=found)
    assert relative_difference(two, one) < 1e-12


@pytest.mark.parametrize("last", [3, STEPS - 1])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_branch_that_falls_out_of_use_names_the_option(last, accumulate):
    loader = DataLoader(labelled(24), batch_size=4)
    options = {"gradient_accumulation_steps": accumulate}
    with pytest.raises(ConfigError, match="find_unused_parameters=True"):
        fitted(Branches(0, last * accumulate), loader, "cpu:2", **options)


def test_batch_norm_keeps_the_statistics_of_rank_0():
    def model() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)).double()

    features, target = labelled(10).tensors
    loader = DataLoader(TensorDataset(features[:2], target[:2]), batch_size=2)
    trained = model()
    with pytest.raises(DataError, match="cannot be trained on one sample"):
        fitted(trained, loader, "cpu:2", max_steps=1)
    trained = model()
    loader = DataLoader(TensorDataset(features[:4], target[:4]), batch_size=4)
    fitted(trained, loader, "cpu:2", max_steps=1)
    hidden = model()[0](features[:2])  # rank 0's part
    expected = 0.1 * hidden.mean(0)
    assert torch.allclose(trained[1].running_mean, expected, atol=1e-6)


def test_fit_changes_nothing_of_the_model_but_its_weights():
    model = classifier()
    model[1].eval()
    before = copy.deepcopy(model)
    keys = list(model.state_dict())
    fitted(model, DataLoader(labelled(12), batch_size=4), "cpu:2")
    assert [part.training for part in model.modules()] == [part.training for part in before.modules()]
    assert list(model.state_dict()) == keys
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.backbone = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.9))
        self.head = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 4))
        self.double()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(features))


@pytest.mark.parametrize("device", DEVICES[:2])
def test_parts_in_evaluation_mode_stay_in_it(device):
    model = Frozen()
    model.backbone.eval()
    before = copy.deepcopy(model)
    fitted(model, DataLoader(labelled(12), batch_size=4), device, eval_data=DataLoader(labelled(12), batch_size=4))
    assert torch.equal(model.backbone[1].running_mean, before.backbone[1].running_mean)
    assert not torch.equal(model.backbone[1].weight, before.backbone[1].weight)
    assert not torch.equal(model.head[0].running_mean, before.head[0].running_mean)
    assert [part.training for part in model.modules()] == [part.training for part in before.modules()]


def test_a_model_in_evaluation_mode_trains_as_a_whole():
    models = Frozen(), Frozen()
    models[1].eval()
    for model in models:
        fitted(model, DataLoader(labelled(12), batch_size=4), "cpu")
    assert relative_difference(*models) == 0
    assert not models[1].training


def test_the_log_names_parts_in_evaluation_mode(capsys):
    model = Frozen()
    model.backbone.eval()
    fitted(model, DataLoader(labelled(12), batch_size=4), "cpu", verbose=True)
    assert "stays in evaluation mode, as before fit: backbone\n" in capsys.readouterr().out


class Annealed(nn.Module):
    """A model whose loss depends on the number of calls, with a layer that its loss does not use."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.layer, self.spare, self.calls = nn.Linear(6, 4), nn.Linear(1, 1), 0
        self.double()

    def loss(self, batch):
        self.calls += 1
        return functional.cross_entropy(self.layer(batch[0]), batch[1]) * self.calls


class NotCopied(Annealed):
    def __deepcopy__(self, memo):
        raise TypeError("holds a lock")


@pytest.mark.parametrize("kind", [Annealed, NotCopied])
def test_finding_unused_parameters_needs_no_extra_forward(kind):
    loader = DataLoader(labelled(12), batch_size=4)
    options = {"loss": "loss", "max_grad_norm": None, "weight_decay": None}
    one, two = [fitted(kind(), loader, device, **options)[0] for device in ("cpu", "cpu:2")]
    assert two.calls == one.calls == STEPS
    assert relative_difference(two.layer, one.layer) < 1e-10


@pytest.mark.parametrize(
    "loss",
    [
        lambda output, target: functional.cross_entropy(output, target, ignore_index=0),
        lambda output, target: functional.nll_loss(output.log_softmax(1), target, torch.arange(1.0, 5.0).double()),
        type("Own", (nn.CrossEntropyLoss,), {})(ignore_index=1),
    ],
)
def test_a_class_loss_inside_a_function_counts_targets_over_all_devices(loss):
    loader = DataLoader(labelled(24), batch_size=8)
    models = [
        fitted(classifier(), loader, device, loss=loss, batch_size_means="global")[0] for device in ("cpu", "cpu:2")
    ]
    assert relative_difference(*models) < 1e-9


def test_a_class_loss_with_something_added_is_announced():
    def loss(output, target):
        return functional.cross_entropy(output, target, ignore_index=0) + output.square().mean()

    with pytest.warns(UserWarning, match="Return \\(sum, weight\\)"):
        reduce_loss(loss, torch.randn(4, 3, requires_grad=True), torch.tensor([0, 1, 2, 1]))
