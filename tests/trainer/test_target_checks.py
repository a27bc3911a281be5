"""Targets that a loss would misread: labels out of range, and shapes that broadcast to a matrix."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from duoka import Trainer
from duoka.errors import ConfigError, DataError
from duoka.trainer.model_with_loss import ModelWithLoss

FEATURES = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


def fit(model: nn.Module, target: torch.Tensor, loss, **options) -> None:
    data = DataLoader(TensorDataset(FEATURES, target), batch_size=4)
    Trainer(model, data, loss=loss, epochs=1, lr=0.1, verbose=False, **{"device": "cpu", **options}).fit()


class Flat(nn.Module):
    """A model with one output a sample, of shape ``(batch,)``."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, features):
        return self.layer(features).squeeze(1)


def own_loss(output, target):
    return functional.mse_loss(output, target) + 0


@pytest.mark.parametrize(
    "loss", [nn.MSELoss(), functional.l1_loss, nn.HuberLoss(), functional.smooth_l1_loss, own_loss]
)
def test_shapes_that_broadcast_are_refused_with_the_remedy(loss):
    with pytest.raises(
        ConfigError, match=r"output of shape \(4, 1\) and a target of shape \(4,\).*output.squeeze\(-1\)"
    ):
        fit(nn.Linear(4, 1), FEATURES[:, 0], loss)
    with pytest.raises(
        ConfigError, match=r"output of shape \(4,\) and a target of shape \(4, 1\).*target.squeeze\(-1\)"
    ):
        fit(Flat(), FEATURES[:, :1], loss)


def test_shapes_are_compared_in_evaluation_and_on_two_devices():
    data = DataLoader(TensorDataset(FEATURES, FEATURES[:, 0]), batch_size=4)
    with pytest.raises(ConfigError, match="squeeze"):
        Trainer(nn.Linear(4, 1), loss=nn.MSELoss(), device="cpu").evaluate(data)
    with pytest.raises(ConfigError, match="squeeze"):
        fit(nn.Linear(4, 1), FEATURES[:, 0], nn.MSELoss(), device="cpu:2")


def test_a_target_of_one_number_is_accepted_with_torchs_warning():
    with pytest.warns(UserWarning, match="Using a target size"):
        fit(nn.Linear(4, 2), FEATURES[:, 0], lambda output, _: functional.mse_loss(output, output.new_ones(1)))


def test_one_shape_is_accepted():
    fit(nn.Linear(4, 1), FEATURES[:, :1], nn.MSELoss())
    fit(Flat(), FEATURES[:, 0], nn.MSELoss())


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 2, 4], "the model has 3 outputs, labels reach 4: labels are 0 to 2; give the last layer 5 outputs"),
        ([1, 2, 3, 3], "the model has 3 outputs, labels reach 3: labels are 0 to 2; subtract 1 from the labels"),
        (
            [-1, 0, 1, 2],
            "the model has 3 outputs, labels go down to -1: labels are 0 to 2; correct the labels, or name",
        ),
    ],
)
@pytest.mark.parametrize(
    "loss", [nn.CrossEntropyLoss(), functional.cross_entropy, lambda a, b: functional.cross_entropy(a, b)]
)
def test_labels_out_of_range_name_both_numbers(labels, message, loss):
    with pytest.raises(DataError) as caught:
        fit(nn.Linear(4, 3), torch.tensor([0, 1, 2, 0, *labels]), loss)
    assert message in str(caught.value)


def test_another_index_error_stays_as_it_is():
    def loss(output, target):
        return [output.sum()][int(target[0]) + 1]

    with pytest.raises(IndexError, match="list index out of range"):
        fit(nn.Linear(4, 3), torch.zeros(8, dtype=torch.int64), loss)


def test_labels_are_checked_before_an_accelerator_gets_them():
    module = ModelWithLoss(nn.Linear(4, 3), nn.CrossEntropyLoss(ignore_index=-1), device_type="cuda")
    with pytest.raises(DataError, match="the model has 3 outputs, labels reach 4"):
        module._reduced(module.loss, FEATURES[:, :3], torch.tensor([0, 1, 2, 4, 0, 0, 0, 0]))
    assert module.label_range == (3, -1)
    module.check_labels((FEATURES, torch.tensor([0, 1, 2, -1])))
    module.check_labels((FEATURES, torch.rand(8, 3)))
    for labels, message in (([0, 3], "labels reach 3"), ([-2, 0], r"labels go down to -2.*only -1 is ignored")):
        with pytest.raises(DataError, match=message):
            module.check_labels((FEATURES, torch.tensor(labels)))


def test_an_index_error_of_a_loss_is_not_its_own_cause():
    def loss(output, target):
        raise IndexError("mine")

    with pytest.raises(IndexError, match="mine") as failed:
        ModelWithLoss(nn.Linear(2, 1), loss)((torch.ones(1, 2), torch.ones(1)))
    assert failed.value.__cause__ is None


def test_a_replica_in_a_thread_does_not_change_the_filters_of_warnings(monkeypatch):
    monkeypatch.setattr("duoka.trainer.model_with_loss.refuse_broadcast", None)
    replica = ModelWithLoss(nn.Linear(2, 1), functional.mse_loss)._replicate_for_data_parallel()
    replica.model = nn.Linear(2, 1)
    assert replica((torch.ones(1, 2), torch.ones(1, 1))).ndim == 0
