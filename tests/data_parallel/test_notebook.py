"""``DataParallel`` in a notebook: a kernel that has trained before, and a model defined in a cell."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

CELLS = [
    """
    import copy, torch, duoka
    from torch import nn
    SCALE = 1.0
    """,
    """
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)
        def forward(self, x):
            return self.layer(x) * SCALE
    def train(model, steps=3):
        torch.manual_seed(0)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = model(torch.randn(6, 4)).pow(2).mean()
            loss.backward()
            optimizer.step()
        return loss.item()
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    """,
    "train(net)\nalone = copy.deepcopy(net), copy.deepcopy(optimizer.state_dict())",
    "model = duoka.DataParallel(net, devices='cpu:2')\nlast = train(model)",
    "net = alone[0]; optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)",
    "optimizer.load_state_dict(alone[1])\nprint(abs(train(net) - last) < 1e-5 * last)",
    "SCALE = 5.0\nx = torch.randn(6, 4)",
    "print(torch.allclose(model(x), model.module(x)))",
    "def forward(self, x): return self.layer(x) + 7\nNet.forward = forward",
    "print(torch.allclose(model(x), model.module(x)))",
]

DRIVER = """
import json, sys
import nbformat
from nbclient import NotebookClient

notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in json.load(sys.stdin)])
NotebookClient(notebook, timeout=100, kernel_name="python3").execute()
print("".join(out.get("text", "") for cell in notebook.cells for out in cell.outputs if out.get("name") == "stdout"))
"""


def test_a_model_of_a_cell_is_wrapped_within_a_session(tmp_path: Path, transport: str) -> None:
    cells = json.dumps([textwrap.dedent(cell) for cell in CELLS])
    # a process of its own, because the notebook's client keeps its event loop until the process ends
    done = subprocess.run([sys.executable, "-c", DRIVER], input=cells, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "True", "True"], done.stderr
