"""What a callback changes on rank 0 reaches all devices."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import duoka
from duoka.errors import ConfigError, UnsupportedError

pytestmark = pytest.mark.usefixtures("pickle_by_value")


class Scaled(nn.Module):
    """Two layers, a temperature in a nested configuration, and a teacher outside ``parameters()``."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6).double(), nn.Linear(6, 3).double()
        self.config = {"loss": {"temperature": 1.0}}
        self.register_buffer("shift", torch.zeros(6, dtype=torch.float64))
        self.teacher = [copy.deepcopy(self.second)]

    def forward(self, x):
        hidden = functional.dropout(self.first(x), 0.0, self.training) + self.shift
        return (self.second(hidden) + 0.1 * self.teacher[0](hidden).detach()) / self.config["loss"]["temperature"]


class LowerRate(duoka.Callback):
    def on_epoch_end(self, state):
        for group in state.optimizer.param_groups:
            group["lr"] *= 0.1


class Clamp(duoka.Callback):
    def on_step_end(self, state):
        with torch.no_grad():
            for parameter in state.model.parameters():
                parameter.clamp_(-0.3, 0.3)


class ClampThroughData(duoka.Callback):
    def on_epoch_end(self, state):
        for parameter in state.model.parameters():
            parameter.data.clamp_(-0.2, 0.2)


class Anneal(duoka.Callback):
    def on_step_end(self, state):
        state.model.config["loss"]["temperature"] *= 1.1


class Shift(duoka.Callback):
    def on_fit_start(self, state):
        state.model.shift.add_(0.5)


class UpdateTeacher(duoka.Callback):
    def on_step_end(self, state):
        with torch.no_grad():
            for mean, new in zip(state.model.teacher[0].parameters(), state.model.second.parameters(), strict=True):
                mean.lerp_(new, 0.5)


class Freeze(duoka.Callback):
    def on_epoch_end(self, state):
        state.model.first.requires_grad_(False)


class Unfreeze(duoka.Callback):
    def on_fit_start(self, state):
        state.model.first.requires_grad_(False)

    def on_epoch_end(self, state):
        if state.epoch == 1:
            state.model.first.requires_grad_(True)


class AddGroup(duoka.Callback):
    def on_epoch_end(self, state):
        if state.epoch == 1:
            state.optimizer.add_param_group({"params": list(state.model.first.parameters()), "lr": 0.01})


def weights_after_fit(callback, device, **options):
    torch.manual_seed(5)
    features = torch.randn(24, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = torch.arange(24) % 3
    model = Scaled()
    settings = {"loss": functional.cross_entropy, "lr": 0.1, "optimizer": "sgd", "epochs": 3, **options}
    if isinstance(callback, AddGroup):
        settings |= {"optimizer": lambda trained: torch.optim.SGD(trained[2:], lr=0.1), "lr": None}
    duoka.Trainer(
        model,
        DataLoader(TensorDataset(features, labels), batch_size=8),
        device=device,
        batch_size_means="global",
        verbose=False,
        callbacks=[callback],
        **settings,
    ).fit()
    return torch.cat([p.detach().flatten() for p in (*model.parameters(), *model.teacher[0].parameters())])


@pytest.mark.parametrize(
    "callback", [LowerRate, Clamp, ClampThroughData, Anneal, Shift, UpdateTeacher, Freeze, Unfreeze, AddGroup]
)
def test_a_callbacks_change_trains_as_on_one_device(callback):
    one, two = (weights_after_fit(callback(), device) for device in ("cpu", "cpu:2"))
    torch.testing.assert_close(two, one)


def test_an_edit_through_data_after_a_step_is_noticed(caplog):
    class Edit(duoka.Callback):
        def on_step_end(self, state):
            for parameter in state.model.parameters():
                parameter.data.clamp_(-0.3, 0.3)

    weights_after_fit(Edit(), "cpu:2")
    assert "Results between steps" in caplog.text


def test_a_callback_that_replaces_a_layer_is_refused_on_several_devices():
    class Replace(duoka.Callback):
        def on_epoch_end(self, state):
            state.model.second = nn.Linear(6, 3).double()

    with pytest.raises(UnsupportedError, match="on_epoch_end replaced layers"):
        weights_after_fit(Replace(), "cpu:2")


def test_a_parameter_that_is_used_at_first_only_names_the_option():
    class FirstSteps(nn.Linear):
        def __init__(self):
            super().__init__(4, 3)
            self.other, self.calls = nn.Linear(4, 3), 0

        def forward(self, x):
            self.calls += self.training
            return super().forward(x) + (self.other(x) if self.calls <= 3 else 0)

    data = DataLoader(TensorDataset(torch.randn(24, 4), torch.arange(24) % 3), batch_size=8)
    options = {"loss": functional.cross_entropy, "device": "cpu:2", "batch_size_means": "global", "verbose": False}
    with pytest.raises(ConfigError, match="find_unused_parameters=True"):
        duoka.Trainer(FirstSteps(), data, epochs=3, **options).fit()
    duoka.Trainer(FirstSteps(), data, epochs=3, find_unused_parameters=True, **options).fit()
