"""The places that a user calls ``launch`` from: a script without a main guard, a REPL, a notebook, torchrun, Slurm."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest
import torch
from jupyter_client.manager import KernelManager
from jupyter_core.utils import ensure_event_loop

import duoka


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


def test_modules_beside_the_script_are_found_by_helpers(tmp_path: Path) -> None:
    (tmp_path / "mymodel.py").write_text("def answer(): return 42\n")
    (tmp_path / "train.py").write_text(
        "import duoka, mymodel\nprint(duoka.launch(mymodel.answer, devices='cpu:2', returns='all'))\n"
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert run(sys.executable, "../train.py", folder=elsewhere) == "[42, 42]\n"


def test_a_file_that_shadows_a_standard_module_does_not_reach_helpers_before_their_work(tmp_path: Path) -> None:
    (tmp_path / "queue.py").write_text("raise SystemError('the wrong queue')\n")
    script = "import duoka\nprint(duoka.launch(lambda: 5, devices='cpu:2'))"
    assert run(sys.executable, "-P", "-c", script, folder=tmp_path) == "5\n"


def test_what_lies_beside_the_installed_package_shadows_no_standard_module_in_helpers(tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / "argparse.py").write_text("raise ImportError('an old backport')\n")
    (site / "duoka").symlink_to(Path(duoka.__file__).parent)
    script = f"import sys\nsys.path = [p for p in sys.path if not p.endswith('/src')] + [{str(site)!r}]\n"
    script += "import argparse, duoka\nassert 'site' in duoka.__file__\nprint(duoka.launch(lambda: 5, devices='cpu:2'))"
    assert run(sys.executable, "-P", "-c", script, folder=tmp_path) == "5\n"


def test_functions_typed_into_a_repl_are_launched(tmp_path: Path) -> None:
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
    ensure_event_loop().close()  # jupyter_client would keep it for the whole process


def execute(client, code: str) -> str:
    """Run a cell and return what it printed; raises when the cell did."""
    shown: list[str] = []

    def take(message) -> None:
        if message["header"]["msg_type"] == "stream":
            shown.append(message["content"]["text"])

    reply = client.execute_interactive(textwrap.dedent(code), output_hook=take, timeout=100)
    if reply["content"]["status"] != "ok":
        raise RuntimeError(f"{reply['content']['ename']}: {reply['content']['evalue']}")
    return "".join(shown)


def test_a_notebook_launches_functions_and_classes_of_its_cells_again_and_again(kernel) -> None:
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


def test_the_helpers_of_a_killed_kernel_are_gone(kernel) -> None:
    manager, client = kernel
    execute(client, "import duoka\nduoka.launch(lambda: 0, devices='cpu:2')")
    pids = [
        int(pid)
        for pid in execute(client, "import psutil; print(*[c.pid for c in psutil.Process().children()])").split()
    ]
    assert pids
    manager.signal_kernel(9)
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=5)
    assert not alive


JOB_SCRIPT = """
    import os
    import duoka, psutil, torch

    def work(scale):
        world = duoka.current_world()
        return scale * world.all_reduce(torch.tensor([world.rank + 1.0])).item(), world.local_rank, world.size

    values = duoka.launch(work, 10, devices="cpu", returns="all")
    first = duoka.launch(work, 1, devices="cpu")
    open(f"out{os.environ.get('RANK', os.environ.get('SLURM_PROCID'))}", "w").write(
        f"{values} {first} {len(psutil.Process().children())}"
    )
"""


def test_under_torchrun_each_process_takes_its_own_place(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(textwrap.dedent(JOB_SCRIPT))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run(*torchrun, "job.py", folder=tmp_path)
    expected = "[(30.0, 0, 2), (30.0, 1, 2)] (3.0, 0, 2) 0"
    assert [(tmp_path / f"out{rank}").read_text() for rank in range(2)] == [expected] * 2


def test_under_slurm_the_tasks_find_each_other_by_slurms_variables(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(textwrap.dedent(JOB_SCRIPT))
    slurm = {
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_JOB_ID": "731",
        "SLURM_JOB_NODELIST": "localhost",
    }
    tasks = [
        subprocess.Popen(
            [sys.executable, "job.py"],
            cwd=tmp_path,
            env={**os.environ, **slurm, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
        )
        for rank in range(2)
    ]
    assert [task.wait(120) for task in tasks] == [0, 0]
    assert (tmp_path / "out1").read_text() == "[(30.0, 0, 2), (30.0, 1, 2)] (3.0, 0, 2) 0"


def test_a_batch_script_that_slurm_started_without_srun_waits_for_nobody(tmp_path: Path) -> None:
    code = "import duoka; print(duoka.launch(lambda: duoka.current_world().size, devices='cpu'))"
    slurm = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "1", "SLURM_LOCALID": "0"}
    assert run(sys.executable, "-c", code, folder=tmp_path, **slurm) == "1\n"


def test_in_a_job_a_device_that_cannot_be_is_an_error_too(monkeypatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(duoka.errors.DeviceError, match="nonsense"):
        duoka.launch(lambda: 0, devices="nonsense")


def test_in_a_job_each_process_takes_its_entry_of_the_named_devices(monkeypatch) -> None:
    from duoka.devices import DeviceSelection
    from duoka.launcher import cluster_environment

    cards = [torch.device("cuda", index) for index in range(4)]
    asked = {"2,3": cards[2:], "cuda:3,0": [cards[3], cards[0]], "auto": cards, "all": cards, "cuda:1": cards[1:2]}
    monkeypatch.setattr(cluster_environment, "resolve", lambda spec: DeviceSelection(tuple(asked[spec]), ""))
    for spec in ("2,3", "cuda:3,0", "auto", "all"):
        assert [cluster_environment._device(spec, rank, 2) for rank in range(2)] == asked[spec][:2]
    assert cluster_environment._device("cuda:1", 0, 1) == cards[1]
    for spec, size, words in (
        ("2,3", 4, "names 2 device.s., and the job has 4 process.es.*nproc-per-node 2"),
        ("cuda:1", 2, "names 1 device.*has 2 process"),
        ("cpu:3", 2, "names 3 device.*has 2 process"),
        ("idle:2", 2, "each would look at another time"),
        ("idle", 2, "each would look at another time"),
    ):
        with pytest.raises(duoka.errors.LaunchError, match=words):
            cluster_environment._device(spec, 0, size)
    with pytest.raises(duoka.errors.LaunchError, match="start at most 4"):
        cluster_environment._device("all", 4, 5)


def test_a_job_of_one_process_that_names_several_devices_gets_helpers_for_them(monkeypatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert duoka.launch(lambda: duoka.current_world().size, devices="cpu:2") == 2
