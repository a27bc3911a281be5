"""Wrappers of scripts: their device numbers, and the comparison with one device."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from duoka.data_parallel import devices_of
from duoka.script_runner import RunSession
from support.run_script import run_duoka, run_plain

pytestmark = pytest.mark.timeout(300)
CPUS = [torch.device("cpu")] * 2


@pytest.mark.parametrize(
    ("device_ids", "numbers", "count"),
    [([0, 1], (2, 3), 2), ([2, 3], (2, 3), 2), ([3], (2, 3), 1), (["cuda:2", "cuda:3"], (2, 3), 2), ([0, 1, 2], (), 2)],
)
def test_device_ids_are_positions_or_the_numbers_that_the_user_named(device_ids, numbers, count) -> None:
    with RunSession(CPUS, numbers=numbers) as session:
        wrapper = nn.DataParallel(nn.Linear(2, 2), device_ids=device_ids)
        assert len(devices_of(wrapper)) == count
    noted = any("The script uses device_ids=[0, 1, 2] at line" in note for note in session.stats.notes)
    assert noted == (len(device_ids) > count)


WRAPPED = """
import torch
from torch import nn
torch.manual_seed(0)
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 1)
    def forward(self, x):
        return FORWARD
model = nn.DataParallel(Model())
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
for _ in range(32):
    x = torch.randn(16, 8)
    optimizer.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    print(f"{loss.item():.6f}")
"""


def test_a_script_that_wraps_itself_gets_the_time_on_one_device(tmp_path) -> None:
    source = WRAPPED.replace("FORWARD", "self.linear(x)")
    plain, parallel = run_plain(tmp_path, source), run_duoka(tmp_path, source)
    assert [float(word) for word in parallel.stdout.split()] == pytest.approx(
        [float(word) for word in plain.stdout.split()], rel=1e-4
    )
    assert "on one device (in some steps, to compare)" in parallel.stderr
    assert "29 / 3" in parallel.stderr
