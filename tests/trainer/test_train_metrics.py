"""Training metrics, the same on any number of devices."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import duoka
from duoka.errors import ConfigError
from duoka.trainer.plots import _panels

X = torch.randn(37, 4, generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(X, (X[:, 0] > 0).long())


def history(device: str, **options):
    torch.manual_seed(0)
    trainer = duoka.Trainer(
        torch.nn.Linear(4, 2), DataLoader(DATA, 8, shuffle=True), loss=torch.nn.functional.cross_entropy, epochs=2, lr=1e-12,
        train_metrics={"accuracy": MulticlassAccuracy(2, average="micro")}, optimizer="sgd", device=device,
        batch_size_means="global",
        verbose=False, **options,
    )  # fmt: skip
    trainer.fit(save_model=False)
    with torch.no_grad():
        truth = (trainer.model(X).argmax(1) == DATA.tensors[1]).float().mean().item()
    return trainer.history, truth


@pytest.mark.parametrize("device", ["cpu", "cpu:2"])
def test_train_metrics_count_every_training_sample_once_per_epoch(device):
    records, truth = history(device)
    assert [record["train_accuracy"] for record in records] == [pytest.approx(truth)] * 2
    panels = {title: [label for label, *_ in lines] for title, lines in _panels(records)}
    assert panels == {"loss": ["training"], "accuracy": ["training"], "learning rate": [""]}


def test_train_metrics_need_a_loss_of_output_and_target():
    with pytest.raises(ConfigError, match="train_metrics need"):
        duoka.Trainer(torch.nn.Linear(4, 2), DATA, train_metrics=MulticlassAccuracy(2), device="cpu")
