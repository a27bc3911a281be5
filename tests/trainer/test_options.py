"""Options of a trainer: errors, optimizers, schedules, precision and early stopping."""

from __future__ import annotations

import collections
import dataclasses
import inspect

import numpy as np
import pytest
import torch
import yaml
from torch import nn

import duoka
from duoka.errors import ConfigError
from duoka.launcher import launch
from duoka.trainer import Callback, Trainer, TrainerConfig
from support.tiny_training import loader, trainer_of

pytestmark = pytest.mark.usefixtures("pickle_by_value")


class Rates(Callback):
    """Notes the learning rate that each step was taken with."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_fit_start(self, state):
        self.rates.append(state.optimizer.param_groups[0]["lr"])

    def on_step_end(self, state):
        self.rates.append(state.optimizer.param_groups[0]["lr"])


def rates(**options) -> list[float]:
    watcher = Rates()
    trainer_of(callbacks=[watcher], **options).fit()
    return watcher.rates[:-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epoch": 3}, "no option 'epoch'; did you mean 'epochs'"),
        ({"batch": "global"}, "'batch'; did you mean 'batch_size_means'"),
        ({"accumulate": 2}, "'accumulate'; did you mean 'gradient_accumulation_steps'"),
        ({"eval_step": 2}, "'eval_step'; did you mean 'eval_every_epochs'"),
        ({"target": "y"}, "'target'; did you mean 'target_key'"),
        ({"predict": "forward"}, "'predict'; did you mean 'predict_fn'"),
        ({"devices": "cpu:2"}, "device='cpu'.*devices='cpu:2'"),
        ({"precision": "fp23"}, "precision='fp23'.*did you mean 'fp32'"),
        ({"optimizer": "adamm"}, "did you mean 'adam'"),
        ({"scheduler": "cosin"}, "did you mean 'cosine'"),
        ({"strategy": "dpp"}, "did you mean 'd"),
        ({"epochs": 0}, "epochs=0 .* 1 or more"),
        ({"epochs": 2.5}, "epochs=2.5"),
        ({"gradient_accumulation_steps": True}, "gradient_accumulation_steps=True"),
        ({"lr": -1}, "lr=-1 .* above 0"),
        ({"max_grad_norm": 0}, "max_grad_norm=0"),
        ({"lr_scaling": "linear"}, "needs lr"),
        ({"warmup_steps": 3, "warmup_epochs": 1}, "warmup_steps=3 and warmup_epochs=1"),
        ({"scheduler_options": {"gamma": 0.1}}, "scheduler_options=.*scheduler=None"),
        ({"optimizer": torch.optim.Adam, "optimizer_options": {"momentun": 1}, "fit": True}, "momentun"),
        ({"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=1), "lr": 0.1}, "lr=0.1 .*your own optimizer"),
        ({"optimizer": lambda _: None, "fit": True}, "returned None"),
        (
            {"optimizer": torch.optim.SGD([nn.Parameter(torch.ones(1))]), "fit": True},
            "1 of the optimizer's 1 parameters",
        ),
        ({"optimizer": 3}, "optimizer=3"),
        ({"out_dir": 3}, "out_dir=3 .*path"),
        ({"verbose": "yes"}, "verbose='yes' .*true or false"),
        ({"monitor": 3}, "monitor=3 .*text or none"),
        ({"optimizer_options": 3}, "optimizer_options=3 .*dict"),
        ({"scheduler": lambda _: 3, "fit": True}, "returned 3"),
        ({"monitor": "loss", "fit": True}, "no eval_data"),
        ({"monitor": "accurcy", "eval_data": loader(), "fit": True}, "monitor='accurcy'.*which has loss"),
        ({"sync_batchnorm": True, "fit": True}, "needs accelerators"),
        ({"lr_scaling": "sqrt", "lr": None}, "needs lr"),
        ({"tensorboard": True}, "needs out_dir"),
        ({"compile": True, "strategy": "dp"}, "use strategy='ddp'"),
    ],
)
def test_values_that_are_not_valid_raise_an_error_that_names_them(options, message):
    fits = options.pop("fit", False)
    with pytest.raises(ConfigError, match=message):
        trainer_of(**options).fit() if fits else trainer_of(**options)


def test_fit_needs_training_data():
    with pytest.raises(ConfigError, match="train_data"):
        Trainer(nn.Linear(5, 2), loss=nn.CrossEntropyLoss(), device="cpu").fit()


def test_a_schedule_object_is_refused_with_the_way_to_write_it():
    schedule = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(nn.Linear(1, 1).parameters()), 1)
    with pytest.raises(ConfigError, match="scheduler=lambda optimizer: StepLR"):
        trainer_of(scheduler=schedule)


def test_every_option_is_in_the_signature_and_documented():
    shown = inspect.signature(Trainer).parameters
    explained = [line.strip().partition(": ")[0] for line in duoka.TrainerConfig.__doc__.splitlines()]
    options = [option.name for option in dataclasses.fields(TrainerConfig)]
    assert set(options) <= set(shown)
    assert [name for name in explained if name in options] == options


def test_options_given_by_name_override_those_of_the_config():
    config = TrainerConfig(epochs=7, lr=0.5)
    assert Trainer(nn.Linear(1, 1), config=config, epochs=3).config == TrainerConfig(epochs=3, lr=0.5)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd", "rmsprop", "adagrad", torch.optim.Adamax])
def test_optimizers_by_name_and_class_train_on_two_devices(optimizer):
    trainer = trainer_of(optimizer=optimizer, lr=0.05, weight_decay=0.01, device="cpu:2")
    before = trainer.model.weight.detach().clone()
    trainer.fit()
    assert not torch.equal(trainer.model.weight, before)


def test_the_users_own_optimizer_takes_the_steps():
    model = nn.Linear(5, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for device in ("cpu", "cpu:2"):
        before = model.weight.detach().clone()
        trainer_of(model=model, optimizer=optimizer, device=device).fit()
        assert not torch.equal(model.weight, before)
        assert optimizer.state[model.weight]["momentum_buffer"].abs().sum() > 0


def test_an_optimizer_function_gets_the_trainable_parameters():
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    seen = []

    def build(parameters):
        seen.extend(parameters)
        return torch.optim.SGD(seen, lr=0.1)

    frozen = model[0].weight.clone()
    trainer_of(model=model, optimizer=build).fit()
    assert [tuple(parameter.shape) for parameter in seen] == [(2, 4), (2,)]
    assert torch.equal(model[0].weight, frozen)


@pytest.mark.parametrize("device", ["cpu", "cpu:2"])
def test_schedules_advance_per_epoch_or_step_on_any_number_of_devices(device):
    common = {"optimizer": "sgd", "lr": 1.0, "batch_size_means": "global", "device": device}  # three steps an epoch

    def halving(optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    epochwise = rates(scheduler=halving, epochs=3, **common)
    assert epochwise[:3] == [1.0] * 3
    assert epochwise[4:6] == [0.5] * 2
    stepwise = rates(scheduler=halving, scheduler_interval="step", **common)
    assert stepwise == [1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125]


def test_the_warm_up_is_linear_and_the_schedule_begins_after_it():
    warm = rates(optimizer="sgd", lr=1.0, warmup_epochs=1, scheduler="cosine", epochs=3)
    assert warm[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert warm[3:6] == pytest.approx([1.0] * 3)
    assert warm[7:] == pytest.approx([0.5] * 2)


def test_the_warm_up_of_a_scaled_rate_starts_from_the_unscaled_rate():
    warm = rates(optimizer="sgd", lr=1.0, lr_scaling="linear", warmup_steps=2, device="cpu:2", epochs=2)
    assert warm == pytest.approx([1.5, 2.0, 2.0, 2.0])


def test_onecycle_ends_at_its_lowest_rate_and_plateau_uses_evaluations():
    cycle = rates(optimizer="sgd", lr=1.0, scheduler="onecycle", epochs=4)
    assert max(cycle) == pytest.approx(1.0, rel=0.2)
    assert cycle[-1] < 0.01

    def plateau(optimizer):
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0)

    trainer = trainer_of(optimizer="sgd", lr=0.1, scheduler=plateau, eval_data=loader(), epochs=4)
    trainer.fit()
    assert trainer.history[-1]["lr"] < 0.1


def test_multistep_decays_at_its_milestones():
    options = {"milestones": [1, 2], "gamma": 0.1}
    falling = rates(optimizer="sgd", lr=1.0, scheduler="multistep", scheduler_options=options, epochs=3)
    assert [falling[1], falling[4], falling[7]] == pytest.approx([1.0, 0.1, 0.01])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_within_its_rounding(precision):
    exact = trainer_of(optimizer="sgd", lr=0.1, max_grad_norm=1.0)
    exact.fit()
    half = trainer_of(
        optimizer="sgd", lr=0.1, max_grad_norm=1.0, precision=precision, device="cpu:2", batch_size_means="global"
    )
    half.fit()
    assert torch.allclose(half.model.weight, exact.model.weight, atol=0.02)
    assert half.model.weight.dtype == torch.float32
    assert not torch.equal(half.model.weight, exact.model.weight)


@pytest.mark.parametrize("device", ["cpu", "cpu:2"])
def test_early_stopping_keeps_the_best_weights(device):
    def worsening(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0 if epoch < 2 else -1.0)

    trainer = trainer_of(
        optimizer="sgd",
        lr=0.1,
        scheduler=worsening,
        eval_data=loader(),
        epochs=20,
        early_stop_patience=2,
        device=device,
    )
    validation, test = trainer.fit()
    assert len(trainer.history) == 4
    assert trainer.best.epoch == 2
    assert "2 evaluations" in trainer.stopped
    assert test == {}
    assert validation["loss"] == trainer.best.value == trainer.history[1]["val_loss"]
    assert trainer.evaluate()["loss"] == pytest.approx(validation["loss"], rel=1e-6)


def test_the_metric_decides_whether_higher_is_better():
    torchmetrics = pytest.importorskip("torchmetrics")

    def worsening(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0 if epoch < 1 else -3.0)

    accuracy = torchmetrics.classification.MulticlassAccuracy(2)
    options = {"optimizer": "sgd", "lr": 0.5, "scheduler": worsening, "eval_data": loader(), "epochs": 3}
    trainer = trainer_of(metrics={"score": accuracy}, monitor="val_score", **options)
    trainer.fit()
    assert trainer.best.value == max(record["val_score"] for record in trainer.history)
    upside_down = trainer_of(metrics={"score": accuracy}, monitor="score", monitor_mode="min", **options)
    upside_down.fit()
    assert upside_down.best.value == min(record["val_score"] for record in upside_down.history)


def test_eval_every_epochs_always_includes_the_last_epoch():
    trainer = trainer_of(eval_data=loader(), epochs=5, eval_every_epochs=2)
    trainer.fit()
    assert [record["epoch"] for record in trainer.history if "val_loss" in record] == [2, 4, 5]


def test_use_multi_gpu_and_strategy_single_use_one_device():
    assert len(trainer_of(device="cpu:3", use_multi_gpu=False).devices) == 1
    assert len(trainer_of(device="cpu:3", strategy="single").devices) == 1
    assert len(trainer_of(device="cpu:3").devices) == 3


def test_the_seed_sets_dropout_masks_and_preserves_the_users_generator():
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(9)
        model = nn.Sequential(nn.Dropout(0.5), nn.Linear(5, 2))
        trainer_of(model=model, seed=seed).fit()
        return model[1].weight

    torch.manual_seed(3)
    before = torch.get_rng_state()
    trainer = trainer_of(model=nn.Linear(5, 2))
    torch.set_rng_state(before)
    trainer.fit()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_a_compiled_step_gives_the_same_result():
    eager = trainer_of(optimizer="sgd", lr=0.1)
    eager.fit()
    compiled = trainer_of(optimizer="sgd", lr=0.1, compile=True)
    with torch._dynamo.config.patch(disable=True):  # the path is the same; compilers are not what is tested
        compiled.fit()
    assert torch.allclose(compiled.model.weight, eager.model.weight)


@pytest.mark.parametrize("device", ["cpu", "cpu:2"])
def test_stopping_between_evaluations_evaluates_the_last_weights(device):
    class AfterFour(Callback):
        def on_epoch_end(self, state):
            if state.epoch == 4:
                state.stop()

    options = {"optimizer": "sgd", "lr": 0.1, "epochs": 9, "eval_every_epochs": 3, "device": device}
    trainer = trainer_of(eval_data=loader(), callbacks=[AfterFour()], **options)
    validation, _ = trainer.fit()
    assert [record["epoch"] for record in trainer.history if "val_loss" in record] == [3, 4]
    assert validation["loss"] == trainer.history[-1]["val_loss"] == pytest.approx(trainer.evaluate()["loss"], rel=1e-6)


@pytest.mark.parametrize("device", ["cpu", "cpu:2"])
def test_plateau_uses_the_training_loss_without_evaluation(device):
    def plateau(optimizer):
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0)

    trainer = trainer_of(optimizer="sgd", lr=0.1, scheduler=plateau, epochs=4, device=device)
    trainer.fit()
    assert trainer.history[-1]["lr"] < 0.1
    with pytest.raises(ConfigError, match=r"scheduler_interval='step'.*ReduceLROnPlateau"):
        trainer_of(scheduler=plateau, scheduler_interval="step").fit()


def test_numpy_numbers_are_valid_and_written_as_plain_numbers():
    config = TrainerConfig(
        epochs=np.int64(3),
        lr=np.float32(0.5),
        compile=np.bool_(False),
        optimizer_options={"betas": (np.float64(0.5), np.float32(0.25)), "eps": np.array([1.0])[0]},
        scheduler="multistep",
        scheduler_options={"milestones": np.array([1, 2]), "gamma": torch.tensor(0.5)},
    )
    written = yaml.safe_load(yaml.safe_dump(config.to_plain()))
    assert (written["epochs"], written["lr"], written["compile"]) == (3, 0.5, False)
    assert written["optimizer_options"] == {"betas": [0.5, 0.25], "eps": 1.0}
    assert written["scheduler_options"] == {"milestones": [1, 2], "gamma": 0.5}


def test_use_multi_gpu_false_is_refused_in_a_job_of_two_processes():
    def on_each_rank() -> None:
        Trainer(nn.Linear(5, 2), loss=nn.CrossEntropyLoss(), device="cpu", use_multi_gpu=False).evaluate(loader())

    with pytest.raises(ConfigError, match=r"use_multi_gpu=False.*2 processes"):
        launch(on_each_rank, devices="cpu:2")


def test_parameters_outside_the_optimizer_keep_no_gradient():
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2))
    seen = []

    class Gradients(Callback):
        def on_step_end(self, state):  # noqa: ARG002
            seen.append([parameter.grad for parameter in model.parameters()])

    trainer_of(model=model, optimizer=torch.optim.SGD(model[1].parameters(), lr=0.1), callbacks=[Gradients()]).fit()
    assert seen == [[None] * 4] * 6


@pytest.mark.parametrize("device", ["cpu", "cpu:2"])
def test_a_gradient_from_before_the_fit_does_not_enter_the_first_step(device):
    models = [nn.Linear(5, 2), nn.Linear(5, 2)]
    models[1].load_state_dict(models[0].state_dict())
    models[1](torch.ones(5)).sum().backward()
    for model in models:
        trainer_of(model=model, optimizer="sgd", lr=0.1, max_steps=1, device=device).fit()
    assert torch.equal(models[0].weight, models[1].weight)


def test_the_loss_scale_is_read_once_per_step_and_only_for_a_schedule(monkeypatch):
    reads = []
    get_scale = torch.amp.GradScaler.get_scale
    monkeypatch.setattr(torch.amp.GradScaler, "get_scale", lambda scaler: reads.append(1) or get_scale(scaler))
    trainer_of(precision="fp16").fit()
    assert not reads
    trainer_of(precision="fp16", scheduler="onecycle").fit()
    assert len(reads) == 1 + 6


def test_a_step_that_overflows_does_not_advance_the_schedule():
    def overflowing(output, target):
        return nn.functional.cross_entropy(output, target) * 1e38  # times the loss scale, past the largest float32

    watcher = Rates()
    trainer_of(
        loss=overflowing,
        precision="fp16",
        optimizer="sgd",
        lr=1.0,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5),
        scheduler_interval="step",
        max_steps=2,
        callbacks=[watcher],
    ).fit()
    assert watcher.rates == [1.0, 1.0, 1.0]


def direction_of(name: str, metrics: dict | None = None) -> bool:
    from duoka.trainer.metrics import Metrics
    from duoka.trainer.model_selection import BestTracker

    pytest.importorskip("torchmetrics")
    return BestTracker(
        TrainerConfig(monitor=name), Metrics(metrics, torch.device("cpu")), has_evaluation=True
    ).lower_is_better


def test_the_metric_or_a_word_of_its_name_decides_the_direction():
    torchmetrics = pytest.importorskip("torchmetrics")
    accuracy = torchmetrics.classification.MulticlassAccuracy
    by_class = torchmetrics.wrappers.ClasswiseWrapper(accuracy(2, average=None), labels=["healthy", "cancer"])
    assert not direction_of("multiclassaccuracy_cancer", {"of": by_class})
    assert not direction_of("smoothed", {"smoothed": torchmetrics.MinMaxMetric(accuracy(2))})
    for name, smaller in {
        "answer_f1": False,
        "glossary_recall": False,
        "cancer_nll": True,
        "ppl": True,
        "tokenError": True,
        "CER": True,
        "top5_accuracy": False,
    }.items():
        assert direction_of(name, {name: torchmetrics.SumMetric()}) is smaller, name
    assert direction_of("loss")


@pytest.mark.parametrize("name", ["cancer_score", "glossary_hits", "power", "accuracy_loss"])
def test_an_unknown_direction_is_an_error(name):
    torchmetrics = pytest.importorskip("torchmetrics")
    with pytest.raises(ConfigError, match=f'monitor=\'{name}\'.*monitor_mode="min" or monitor_mode="max"'):
        direction_of(name, {name: torchmetrics.SumMetric()})


def test_a_metric_that_keeps_results_in_an_attribute_is_refused():
    torchmetrics = pytest.importorskip("torchmetrics")

    class Names(torchmetrics.Metric):
        def __init__(self):
            super().__init__()
            self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
            self.names = []

        def update(self, _output, target):
            self.total += len(target)
            self.names += target.tolist()

        def compute(self):
            return torch.tensor(float(len(self.names)))

    with pytest.raises(ConfigError, match="Names keeps results in its attribute 'names'"):
        trainer_of(metrics=Names(), device="cpu:2").evaluate(loader())
    assert trainer_of(metrics={"n": Names()}).evaluate(loader())["n"] == 12


def test_metrics_with_lists_of_tuples_or_their_own_merge_are_exact():
    torchmetrics = pytest.importorskip("torchmetrics")

    class Pairs(torchmetrics.Metric):
        def __init__(self):
            super().__init__()
            self.add_state("pairs", default=[], dist_reduce_fx=None)

        def update(self, output, target):
            self.pairs += [(one, int(label)) for one, label in zip(output.argmax(1), target, strict=True)]

        def compute(self):
            return torch.tensor([float(one) + 10 * label for one, label in self.pairs]).sort().values

    class Counted(torchmetrics.Metric):
        def __init__(self):
            super().__init__()
            self.labels = collections.Counter()

        def update(self, _output, target):
            self.labels.update(target.tolist())

        def merge_state(self, incoming_state):
            self.labels.update(incoming_state.labels)

        def compute(self):
            return torch.tensor([float(self.labels[label]) for label in range(2)])

    metrics = {"pairs": Pairs(), "labels": Counted()}
    one, two, three = [trainer_of(metrics=metrics, device=d).evaluate(loader(11)) for d in ("cpu", "cpu:2", "cpu:3")]
    for other in (two, three):
        assert torch.equal(one["pairs"], other["pairs"])
        assert one["labels"].sum() == 11
        assert torch.equal(one["labels"], other["labels"])


@pytest.mark.parametrize("kind", [int, dict, set, lambda: torch.zeros(())])
def test_a_metric_that_counts_in_an_attribute_is_refused(kind):
    torchmetrics = pytest.importorskip("torchmetrics")

    class Counts(torchmetrics.Metric):
        def __init__(self):
            super().__init__()
            self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
            self.seen = kind()

        def update(self, _output, target):
            self.total += len(target)
            if isinstance(self.seen, dict):
                self.seen[len(self.seen)] = len(target)
            elif isinstance(self.seen, set):
                self.seen.add(len(target))
            else:
                self.seen += len(target)

        def compute(self):
            return torch.tensor(float(self.total))

    with pytest.raises(ConfigError, match=r"Counts keeps results in its attribute 'seen'.*add_state"):
        trainer_of(metrics=Counts(), device="cpu:2").evaluate(loader())
