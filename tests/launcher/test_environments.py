"""``launch`` from a script without a main guard, from a REPL, and from a notebook."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from jupyter_client.manager import KernelManager
from jupyter_core.utils import ensure_event_loop

import duoka
from support.processes import wait_until_gone


def run(*command: str, folder: Path, text: str | None = None, **variables: str) -> str:
    environment = {**os.environ, **variables}
    done = subprocess.run(command, input=text, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


TOP_LEVEL_SCRIPT = """
    print("top level runs")

    import torch
    from torch import nn
    import duoka

    class Doubler(nn.Module):
        def forward(self, x):
            return 2 * x

    FACTOR = 10

    def work(model, x):
        return FACTOR * model(x).sum().item() + duoka.current_world().rank

    print(duoka.launch(work, Doubler(), torch.ones(3), devices="cpu:3", returns="all"))
"""


def test_a_top_level_script_needs_no_main_guard_and_runs_once(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(TOP_LEVEL_SCRIPT))
    assert run(sys.executable, str(script), folder=tmp_path) == "top level runs\n[60.0, 61.0, 62.0]\n"


def test_workers_import_modules_beside_the_script(tmp_path: Path) -> None:
    (tmp_path / "mymodel.py").write_text("def answer(): return 42\n")
    (tmp_path / "train.py").write_text(
        "import duoka, mymodel\nprint(duoka.launch(mymodel.answer, devices='cpu:2', returns='all'))\n"
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert run(sys.executable, "../train.py", folder=elsewhere) == "[42, 42]\n"


def test_a_file_named_like_a_standard_module_does_not_break_workers(tmp_path: Path) -> None:
    (tmp_path / "queue.py").write_text("raise SystemError('the wrong queue')\n")
    script = "import duoka\nprint(duoka.launch(lambda: 5, devices='cpu:2'))"
    assert run(sys.executable, "-P", "-c", script, folder=tmp_path) == "5\n"


def test_a_module_beside_the_installed_package_does_not_break_workers(tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / "argparse.py").write_text("raise ImportError('an old backport')\n")
    (site / "duoka").symlink_to(Path(duoka.__file__).parent)
    script = f"import sys\nsys.path = [p for p in sys.path if not p.endswith('/src')] + [{str(site)!r}]\n"
    script += "import argparse, duoka\nassert 'site' in duoka.__file__\nprint(duoka.launch(lambda: 5, devices='cpu:2'))"
    assert run(sys.executable, "-P", "-c", script, folder=tmp_path) == "5\n"


def test_functions_from_a_repl_can_be_launched(tmp_path: Path) -> None:
    lines = "import duoka\ndef f(): return duoka.current_world().rank + 7\n\n"
    lines += "print(duoka.launch(f, devices='cpu:2', returns='all'))\n"
    assert run(sys.executable, "-i", "-q", folder=tmp_path, text=lines).endswith("[7, 8]\n")


@pytest.fixture
def kernel():
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel()
    client = manager.client()
    client.start_channels()
    client.wait_for_ready(timeout=60)
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)
    manager.cleanup_resources()
    ensure_event_loop().close()  # jupyter_client keeps it open otherwise


def execute(client, code: str) -> str:
    """Run a cell and return its output; raises when the cell raises."""
    shown: list[str] = []

    def take(message) -> None:
        if message["header"]["msg_type"] == "stream":
            shown.append(message["content"]["text"])

    reply = client.execute_interactive(textwrap.dedent(code), output_hook=take, timeout=100)
    if reply["content"]["status"] != "ok":
        raise RuntimeError(f"{reply['content']['ename']}: {reply['content']['evalue']}")
    return "".join(shown)


def test_a_notebook_can_launch_functions_and_classes_of_its_cells(kernel) -> None:
    _, client = kernel
    execute(client, "import torch, duoka, psutil\nfrom torch import nn")
    execute(client, "class Net(nn.Linear):\n    def forward(self, x): return super().forward(x) * SCALE\nSCALE = 2.0")
    execute(client, "net = Net(4, 1)\nbefore = net.weight.clone()")
    execute(
        client,
        """
        def train(model):
            world = duoka.current_world()
            wrapped = nn.parallel.DistributedDataParallel(model)
            optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
            for _ in range(3):
                optimizer.zero_grad()
                wrapped(torch.ones(2, 4) * (world.rank + 1)).sum().backward()
                optimizer.step()
            return model.weight.detach()
        """,
    )
    shown = execute(
        client,
        """
        first, second = duoka.launch(train, net, devices="cpu:2", returns="all")
        print(torch.equal(first, second), torch.equal(net.weight, first), torch.equal(before, first))
        """,
    )
    assert shown == "True True False\n"
    execute(client, "def train(model): return 'redefined'")
    assert (
        execute(client, "print(duoka.launch(train, net, devices='cpu:2', returns='all'))")
        == "['redefined', 'redefined']\n"
    )
    assert execute(client, "print(len(psutil.Process().children()))") == "1\n"


def test_interrupting_a_cell_stops_all_ranks_and_the_next_cell_works(kernel) -> None:
    manager, client = kernel
    execute(client, "import duoka, torch, torch.distributed as dist, time\nduoka.launch(lambda: 0, devices='cpu:2')")
    client.execute(
        "def hang():\n    if duoka.current_world().rank: time.sleep(100)\n    print('in', flush=True)\n"
        "    dist.all_reduce(torch.ones(1))\nduoka.launch(hang, devices='cpu:2')"
    )
    while client.get_iopub_msg(timeout=30)["content"].get("text") != "in\n":
        pass
    manager.interrupt_kernel()
    reply = client.get_shell_msg(timeout=10)
    assert reply["content"]["ename"] == "KeyboardInterrupt"
    assert execute(client, "print(duoka.launch(lambda: 3, devices='cpu:2', returns='all'))") == "[3, 3]\n"


def test_the_workers_of_a_killed_kernel_end(kernel) -> None:
    manager, client = kernel
    execute(client, "import duoka\nduoka.launch(lambda: 0, devices='cpu:2')")
    pids = [
        int(pid)
        for pid in execute(client, "import psutil; print(*[c.pid for c in psutil.Process().children()])").split()
    ]
    assert pids
    manager.signal_kernel(9)
    wait_until_gone(pids)
