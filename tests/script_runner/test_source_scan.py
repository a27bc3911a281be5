"""``create_graph`` counts where a call has the value True, or gets it at run time."""

from __future__ import annotations

import pytest

from duoka.script_runner.source_scan import differentiates_gradients
from support.run_script import run_duoka, run_plain

pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize(
    ("source", "answer"),
    [
        (b"grad(y, x, create_graph=True)", True),
        (b"grad(y, x, create_graph = True)\ngrad(y, x, create_graph=flag)", True),
        (b"grad(y, x, create_graph=False)", False),
        (b"def f(create_graph=False): ...", False),
        (b"# create_graph=True\nif create_graph == True: pass", False),
        (b"loss.backward(create_graph=create_graph)", None),
        (b"loss.backward(create_graph=not first_order)", None),
        (b"create_graph = (", False),
    ],
)
def test_create_graph_in_a_source(source: bytes, answer: bool | None) -> None:
    assert differentiates_gradients(source) is answer


SCALER = """
import torch
from torch import nn
def step(loss, optimizer, create_graph):
    optimizer.zero_grad()
    loss.backward(create_graph=create_graph)
    if create_graph:
        sum(p.grad.square().sum() for p in model.parameters()).backward()
    optimizer.step()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
for _ in range(4):
    x = torch.randn(16, 8)
    loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True)) + model(-x).square().mean()
    step(loss, optimizer, FLAG)
    print(f"{loss.item():.5f}")
"""


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.filterwarnings("ignore:Using backward")
def test_a_variable_create_graph_counts_only_if_it_is_true(flag: bool, tmp_path) -> None:
    source = SCALER.replace("FLAG", str(flag and "model.training"))
    plain, parallel = run_plain(tmp_path, source), run_duoka(tmp_path, source)
    assert plain.returncode == parallel.returncode == 0, parallel.stderr
    assert [float(word) for word in parallel.stdout.split()] == pytest.approx(
        [float(word) for word in plain.stdout.split()], rel=1e-4
    )
    assert ("the script differentiates gradients" in parallel.stderr) == flag
    assert ("times" in parallel.stderr or "all devices" in parallel.stderr) == (not flag)
