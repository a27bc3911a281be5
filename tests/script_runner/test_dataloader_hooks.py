"""``--scale-batch`` multiplies training batches alone, and warns where no model gains from them."""

from __future__ import annotations

import pytest

from support.run_script import run_duoka

pytestmark = pytest.mark.timeout(300)

TRAINING = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(8, 1)
    def forward(self, x):
        return self.out(x - CENTER)
x = torch.randn(64, 8)
data = TensorDataset(x, x.sum(1, keepdim=True))
loader, test_loader = DataLoader(data, 16, shuffle=True), DataLoader(data, 16, shuffle=True)
model = Model()
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
for epoch in range(2):
    for features, target in loader:
        optimizer.zero_grad()
        nn.functional.mse_loss(model(features), target).backward()
        optimizer.step()
    with torch.no_grad():
        sizes = [len(model(features)) for features, _ in test_loader]
    print(len(features), len(loader), sizes, len(test_loader))
"""


def test_a_test_loader_that_shuffles_keeps_its_batch_size(tmp_path) -> None:
    ended = run_duoka(tmp_path, TRAINING.replace("CENTER", "0.5"), "--scale-batch")
    assert ended.stdout.splitlines() == ["32 2 [16, 16, 16, 16] 4"] * 2, ended.stderr
    assert "DataLoader at line 13 of t.py: batch size 16 -> 32" in ended.stderr
    assert ended.stderr.count("batch size 16 -> 32") == 1
    assert "in vain" not in ended.stderr


def test_batches_multiplied_in_vain_give_a_warning_and_a_line(tmp_path) -> None:
    ended = run_duoka(tmp_path, TRAINING.replace("CENTER", "x.mean(0)"), "--scale-batch")
    text = " ".join(ended.stderr.split())
    assert "Model (trained by SGD at line 15 of t.py) runs on one device, with batches that --scale-batch" in text
    assert "--scale-batch was in vain: no model ran on all devices. Run without it." in text
    assert "The learning rate" not in text
