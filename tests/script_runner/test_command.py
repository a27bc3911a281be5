"""The command line of ``duoka run``: arguments, the dry run, refusals, scripts and notebooks."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from duoka.cli.main import main
from duoka.cli.run import RunArguments, parse
from duoka.errors import ConfigError

pytestmark = pytest.mark.timeout(600)  # two or three processes a test import torch: a busy machine takes minutes
SCRIPTS = Path(__file__).parent / "scripts"


@pytest.mark.parametrize(
    ("words", "request_"),
    [
        (["t.py"], RunArguments("t.py", ())),
        (["t.py", "--epochs", "3", "--device", "0,1"], RunArguments("t.py", ("--epochs", "3"), device="0,1")),
        (["--device=cpu:2", "t.py", "--device", "cuda"], RunArguments("t.py", ("--device", "cuda"), device="cpu:2")),
        (
            ["t.py", "--device", "cpu:2", "--", "--device", "cuda"],
            RunArguments("t.py", ("--device", "cuda"), device="cpu:2"),
        ),
        (["--scale-batch", "t.py", "--", "x"], RunArguments("t.py", ("x",), scale_batch=True)),
        (["t.py", "-m", "y", "--explain"], RunArguments("t.py", ("-m", "y"), explain=True)),
        (
            ["--device", "cpu", "-m", "pkg.train", "-x"],
            RunArguments("pkg.train", ("-x",), is_module=True, device="cpu"),
        ),
        (["-m", "pkg.train", "--device", "cpu:2"], RunArguments("pkg.train", (), is_module=True, device="cpu:2")),
        (["t.py", "--debug"], RunArguments("t.py", ("--debug",))),
        (["--explain", "t.py", "--device", "cpu:2", "-x"], RunArguments("t.py", ("-x",), device="cpu:2", explain=True)),
    ],
)
def test_each_argument_belongs_to_duoka_or_to_the_script(words: list[str], request_: RunArguments) -> None:
    assert parse(words) == request_


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device"], "needs a value"),
        (["-m"], "name of a module"),
        (["--device", "cpu:2"], "script is missing"),
        (["--device", "t.py"], "has taken 't.py' as its value"),
        (["--dvice", "cpu:2", "t.py"], "unknown option --dvice; did you mean '--device'"),
    ],
)
def test_an_invalid_command_line_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.py"], "asks.py, binary.py, here.py"),
        (["."], "is a folder"),
        (["-m", "no.such.module"], "there is no module 'no.such.module'"),
        (["nowhere.ipynb"], "there is no notebook"),
        (["bad.ipynb"], "is not a valid notebook"),
        (["here.py", "--device", "cpu:0"], "cpu:0"),
        (["here.py", "--device", "cuda:77"], "77"),
        (["asks.py", "--device", "cpu:2"], "may be meant for duoka or for asks.py"),
        (["asks.py", "--device", "0,1"], "may be meant for duoka or for asks.py"),
        (
            ["here.py", "--devise", "cpu:2"],
            "--devise is no option of duoka, and here.py does not seem to have it; did you mean '--device'",
        ),
        (["here.py", "--device=cpu:2", "--scale_batch"], "did you mean '--scale-batch'"),
        (["binary.py"], "binary data"),
        (["taken.ipynb"], "taken.out.ipynb"),
        (["--explain", "wrong.py"], "wrong.py, line 1"),
        (["--explain", "here.ipynb"], "--explain reads scripts"),
    ],
)
def test_a_mistake_gets_one_message_and_status_2(words, message, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "here.py").write_text("print('ran')")
    (tmp_path / "asks.py").write_text("import argparse\np = argparse.ArgumentParser()\np.add_argument('--device')")
    (tmp_path / "wrong.py").write_text("def (:")
    (tmp_path / "bad.ipynb").write_text("{")
    (tmp_path / "binary.py").write_bytes(b"PK\0")
    (tmp_path / "taken.ipynb").write_text('{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}')
    (tmp_path / "taken.out.ipynb").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["run", *words]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.startswith("duoka: ")
    assert "Traceback" not in err
    assert "ran" not in out


@pytest.mark.parametrize(
    ("words", "received"),
    [
        (["asks.py", "--device", "cuda", "--epochs", "3"], ["--device", "cuda", "--epochs", "3"]),
        (["asks.py", "--device=cuda:1"], ["--device=cuda:1"]),
        (["beside.py", "--device", "cpu"], ["--device", "cpu"]),
        (["--device", "cpu", "asks.py", "--device", "0"], ["--device", "0"]),
        (["here.py", "--device", "cpu", "x"], ["x"]),
    ],
)
def test_a_script_with_an_option_for_one_device_gets_it(words, received, tmp_path, monkeypatch, capsys) -> None:
    show = "import sys\nprint(sys.argv[1:])\n"
    (tmp_path / "here.py").write_text(show)
    (tmp_path / "asks.py").write_text(
        f"{show}import argparse\np = argparse.ArgumentParser()\np.add_argument('--device')"
    )
    (tmp_path / "options.py").write_text("NAMES = ['--device']")
    (tmp_path / "beside.py").write_text(f"{show}from options import NAMES\n")
    monkeypatch.chdir(tmp_path)
    assert main(["run", *words]) == 0
    assert capsys.readouterr().out.strip() == str(received)


def test_explain_names_each_call_and_runs_nothing(capsys, tmp_path) -> None:
    script = SCRIPTS / "gan.py"
    assert main(["run", "--explain", "--scale-batch", "--device", "cpu:2", str(script)]) == 0
    message = capsys.readouterr().out
    lines = script.read_text().splitlines()
    number = next(index for index, line in enumerate(lines, 1) if "nn.DataParallel(netG" in line)
    assert f"line {number}: nn.DataParallel(netG" in message
    assert "becomes 2 x batch_size" in message
    assert "errD" not in message


def test_explain_reports_that_it_finds_no_model(capsys, tmp_path) -> None:
    (tmp_path / "t.py").write_text("print(1)")
    assert main(["run", "--explain", "--device", "cpu:2", str(tmp_path / "t.py")]) == 0
    assert "run as it does without duoka" in capsys.readouterr().out


def duoka(*words: str, cwd: Path, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "duoka", *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, **options)


@pytest.mark.parametrize("device", ["cpu", "cpu:2"])
def test_a_script_finds_argv_path_and_main_as_under_python(device, tmp_path) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "beside.py").write_text("VALUE = 5")
    (folder / "t.py").write_text(
        "import json, os, pickle, sys\n"
        "import __main__, beside\n"
        "class Own: pass\n"
        "print(json.dumps([sys.argv, sys.path[0], os.getcwd(), __name__, __file__, __main__.beside.VALUE,\n"
        "    type(pickle.loads(pickle.dumps(Own()))).__name__, __package__, __spec__]))\n"
        "sys.exit(7)"
    )
    plain = subprocess.run(
        [sys.executable, "project/t.py", "-x", "1"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    parallel = duoka("run", "--device", device, "project/t.py", "-x", "1", cwd=tmp_path)
    assert (parallel.returncode, json.loads(parallel.stdout)) == (7, json.loads(plain.stdout))


@pytest.mark.parametrize(
    ("code", "status", "last"),
    [
        ("def f():\n    raise KeyError('x')\nf()", 1, "KeyError: 'x'"),
        ("import sys\nsys.exit('stopped')", 1, "stopped"),
        ("import os\nos.kill(os.getpid(), 2)\nimport time; time.sleep(9)", 130, "KeyboardInterrupt"),
        ("x = (", 1, "SyntaxError: '(' was never closed"),
    ],
)
def test_a_script_ends_as_under_python(code, status, last, tmp_path) -> None:
    (tmp_path / "t.py").write_text(code)
    ended = duoka("run", "--device", "cpu", "t.py", cwd=tmp_path)
    assert ended.returncode == status
    trace = ended.stderr.strip()
    assert trace.endswith(last)  # without a report
    assert "duoka" not in trace
    assert "runpy" not in trace


TRAINING = """
import torch
from torch.utils.data import DataLoader, TensorDataset
torch.manual_seed(0)
model = torch.nn.Linear(4, 1)
data = TensorDataset(torch.randn(64, 4), torch.randn(64, 1))
loader = DataLoader(data, 8, shuffle=True)
test_loader = DataLoader(data, 8)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
for x, y in loader:
    optimizer.zero_grad()
    torch.nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()
print(len(loader), len(test_loader), loader.batch_size)
"""


def test_scale_batch_multiplies_training_batches_and_reports_it(tmp_path) -> None:
    (tmp_path / "t.py").write_text(TRAINING)
    ended = duoka("run", "t.py", "--device", "cpu:2", "--scale-batch", cwd=tmp_path)
    assert ended.stdout.split() == ["4", "8", "16"]
    assert "DataLoader at line 7 of t.py: batch size 8 -> 16" in ended.stderr
    assert "trained by SGD at line 9 of t.py" in " ".join(ended.stderr.replace("│", " ").split())


THREADED = """
import threading, time, torch
device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
ended = threading.Event()
def work():
    ended.wait()
    time.sleep(0.2)  # so that the emulation would have ended, unless the thread is joined first
    print(torch.ones(3, device=device).to("cuda" if torch.cuda.is_available() else "cpu").sum().item())
    print("end of the thread")
threading.Thread(target=work).start()
print("end of the script")
ended.set()
"""


def test_threads_of_a_script_see_emulated_devices_and_are_joined(tmp_path) -> None:
    (tmp_path / "t.py").write_text(THREADED)
    ended = duoka("run", "t.py", "--device", "cpu:2", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == ["end of the script", "3.0", "end of the thread"]


GATED = """
import torch
torch.manual_seed(0)
class Gated(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.gate = torch.nn.Linear(4, 4), torch.nn.Parameter(torch.zeros(()))
    def forward(self, x):
        y = self.linear(x)
        return y + self.gate * y.mean(0)  # nothing at first: gates often start at zero
model = Gated()
optimizer = torch.optim.SGD(model.parameters(), 0.3)
x, y = torch.randn(16, 4), torch.randn(16, 4)
for _ in range(6):
    loss = torch.nn.functional.mse_loss(model(x), y)
    optimizer.zero_grad(); loss.backward(); optimizer.step()
    print(f"{loss.item():.6f}")
"""


def test_a_model_is_checked_again_because_it_may_change(tmp_path) -> None:
    (tmp_path / "t.py").write_text(GATED)
    plain = subprocess.run([sys.executable, "t.py"], cwd=tmp_path, capture_output=True, text=True, check=True)
    parallel = duoka("run", "t.py", "--device", "cpu:2", cwd=tmp_path)
    assert [float(x) for x in parallel.stdout.split()] == pytest.approx(
        [float(x) for x in plain.stdout.split()], rel=1e-4
    )
    assert "depends on other samples" in parallel.stderr


ASKING = """
import torch
from torch import nn
model, x = nn.Linear(4, 2).cuda(), torch.randn(8, 4)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
torch.save(model.state_dict(), "w.pt")
stream, event = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True)
questions = {
    "pinned": lambda: x.pin_memory().cuda(non_blocking=True) is not None and torch.empty(3, pin_memory=True) is not None,
    "generator": lambda: torch.randn(3, generator=torch.Generator("cuda").manual_seed(0), device="cuda").shape == (3,),
    "generators": lambda: isinstance(torch.Generator(device="cuda:1"), torch.Generator),
    "streams": lambda: x.cuda().record_stream(torch.cuda.default_stream()) is None and stream.query(),
    "events": lambda: stream.wait_event(stream.record_event()) is None and event.query(),
    "type": lambda: x.type("torch.cuda.HalfTensor").dtype == torch.half,
    "numbers": lambda: x.to(1).shape == torch.zeros(8, 4, device=0).shape,
    "storages": lambda: "weight" in torch.load("w.pt", map_location=lambda storage, _: storage.cuda(0)),
    "peers": lambda: torch.cuda.can_device_access_peer(0, 1) and not torch.cuda.is_current_stream_capturing(),
    "seed": lambda: torch.cuda.initial_seed() == torch.initial_seed(),
    "forked": lambda: torch.random.fork_rng(devices=[0]).__enter__() is None,
    "function": lambda: nn.parallel.data_parallel(model, x.cuda(), device_ids=[0, 1]).shape == (8, 2),
}
for name, ask in questions.items():
    try:
        answer = ask()
    except Exception as error:
        answer = repr(error)
    if answer is not True:
        print(name, answer)
try:
    x.to(2)
except RuntimeError as error:
    print(error)
"""


def test_scripts_can_use_the_emulated_cuda_api(tmp_path) -> None:
    (tmp_path / "t.py").write_text(ASKING)
    asked = duoka("run", "t.py", "--device", "cpu:2", cwd=tmp_path)
    assert asked.stdout.splitlines() == ["CUDA error: invalid device ordinal 2: this run has 2 devices"]


PENALTY = """
import torch
def penalty(critic, x):
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return ((slope.norm(dim=1) - 1) ** 2).mean()
"""
CRITIC = """
import torch, penalties
torch.manual_seed(0)
critic = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
optimizer = torch.optim.SGD(critic.parameters(), 0.1)
for number in range(4):
    x = torch.randn(8, 4)
    loss = critic(x).mean() - critic(-x).mean() + penalties.penalty(critic, x)
    optimizer.zero_grad(); loss.backward(); optimizer.step()
    print(f"{loss.item():.6f}")
"""


@pytest.mark.extended
def test_create_graph_in_a_module_of_the_script_keeps_models_whole(tmp_path) -> None:
    (tmp_path / "penalties.py").write_text(PENALTY)
    (tmp_path / "t.py").write_text(CRITIC)
    plain = subprocess.run([sys.executable, "t.py"], cwd=tmp_path, capture_output=True, text=True, check=True)
    parallel = duoka("run", "t.py", "--device", "cpu:2", cwd=tmp_path)
    assert parallel.stdout == plain.stdout
    assert "create_graph=True" in parallel.stderr


OUTSIDE = """
import os, torch
torch.manual_seed(0)
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.dropout = torch.nn.Linear(4, 1), torch.nn.Dropout(0.5)
    def forward(self, x):
        return self.dropout(self.linear(x)) * float(os.environ["SCALE"])
model = Net()
optimizer = torch.optim.SGD(model.parameters(), 0.1)
for number in range(9):
    os.environ["SCALE"] = "1" if number < 4 else "2"
    model(torch.randn(16, 4)).square().mean().backward()
    optimizer.step()
"""


def test_workers_with_a_stale_environment_variable_are_detected(tmp_path) -> None:
    (tmp_path / "t.py").write_text(OUTSIDE)
    parallel = duoka("run", "t.py", "--device", "cpu:2", cwd=tmp_path)
    assert "Net runs on one device from here on: its forward reads a variable outside" in parallel.stderr


GUARDED = """
import os, torch
torch.manual_seed(0)
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 1)
    def forward(self, x):
        if x.mean() > 100 and os.environ.get("READY") != "yes":
            raise ValueError("not ready")
        return self.linear(x)
model = Net()
optimizer = torch.optim.SGD(model.parameters(), 1e-6)
for number in range(5):
    os.environ["READY"] = "yes" if number > 2 else "no"
    loss = model(torch.randn(16, 4) + (200 if number == 3 else 0)).square().mean()
    optimizer.zero_grad(); loss.backward(); optimizer.step()
    print(f"{loss.item():.4f}")
"""


def test_a_worker_that_fails_in_a_check_is_a_reason_and_no_error(tmp_path) -> None:
    (tmp_path / "t.py").write_text(GUARDED)
    plain = subprocess.run([sys.executable, "t.py"], cwd=tmp_path, capture_output=True, text=True, check=True)
    parallel = duoka("run", "t.py", "--device", "cpu:2", cwd=tmp_path)
    assert parallel.stdout == plain.stdout, parallel.stderr
    assert "a worker cannot compute its part: ValueError: not ready" in parallel.stderr


FAILS_ON_A_WORKER = """
import os, random, numpy, torch
script = os.getpid()
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 1)
    def forward(self, x):
        y = torch.nn.functional.dropout(self.linear(x), 0.5)
        random.random(), numpy.random.rand()
        if x.mean() > 100 and os.getpid() != script:
            raise ValueError("not here")
        return y
torch.manual_seed(0)
model = Net()
optimizer = torch.optim.SGD(model.parameters(), 0.0)
for number in range(5):
    torch.manual_seed(number); random.seed(number); numpy.random.seed(number)
    x = torch.randn(16, 4) + (200 if number == 2 else 0)  # not in a call with a check: 1, 2, 4
    loss = model(x).square().mean()
    if number == 2:
        print(f"{loss.item():.4f} {torch.rand(()).item():.4f} {random.random():.4f} {numpy.random.rand():.4f}")
    optimizer.zero_grad(); loss.backward(); optimizer.step()
"""


def test_a_batch_that_fails_on_a_worker_is_computed_with_the_same_mask(tmp_path) -> None:
    (tmp_path / "t.py").write_text(FAILS_ON_A_WORKER)
    plain = subprocess.run([sys.executable, "t.py"], cwd=tmp_path, capture_output=True, text=True, check=True)
    parallel = duoka("run", "t.py", "--device", "cpu:2", cwd=tmp_path)
    assert parallel.stdout == plain.stdout, parallel.stderr
    assert "a device failed on its part of a batch: ValueError: not here" in " ".join(parallel.stderr.split())


OWN_STEPS = """
import torch
from torch import nn

class Balanced(nn.DataParallel):
    def scatter(self, inputs, kwargs, device_ids):
        raise AssertionError("not needed on one device")

torch.manual_seed(0)
model = Balanced(nn.Linear(4, 2), device_ids=list(range(max(1, torch.cuda.device_count()))))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(3):
    optimizer.zero_grad()
    loss = model(torch.ones(8, 4)).square().mean()
    loss.backward()
    optimizer.step()
print("loss", loss.item())
"""


def test_a_wrapper_with_its_own_scatter_runs_on_one_device(tmp_path) -> None:
    (tmp_path / "train.py").write_text(OWN_STEPS)
    done = duoka("run", "train.py", "--device", "cpu:2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "loss " in done.stdout
    assert "its wrapper Balanced overrides scatter" in " ".join(done.stderr.split())


OWN_WRAPPER = """
import torch
from torch import nn

import duoka

class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, original):
        return self.linear(original)

class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = duoka.DataParallel(Head(), devices="cpu:2")

    def forward(self, original):
        return self.head(original=original)

torch.manual_seed(0)
model = MODEL
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(30):
    optimizer.zero_grad()
    loss = (model(original=torch.ones(9, 4)) - 1).square().mean()  # not to 0, where rounding is all that is left
    loss.backward()
    optimizer.step()
print("loss", loss.item())
"""


@pytest.mark.parametrize(
    ("model", "device", "row"),
    [
        ("duoka.DataParallel(Head().to('cpu'), devices='cpu:3')", "cpu:2", ["3", "9", "3", "30 / 0"]),
        ("duoka.DataParallel(Head(), devices='cpu:3')", "cpu", ["3", "9", "3", "30 / 0"]),
        ("duoka.DataParallel(Whole(), devices='cpu:3')", "cpu:2", ["3", "9", "3", "30 / 0"]),
        ("duoka.DataParallel(Head(), devices='cpu')", "cpu:2", ["2", "9", "4 or 5", "26 / 4"]),
        ("nn.DataParallel(Head(), device_ids=[0])", "cpu:2", ["1", "9", "9", "0 / 30"]),
    ],
)
def test_a_model_that_the_script_wraps_is_in_the_report(model, device, row, tmp_path) -> None:
    """Its calls are counted once, with the whole batch; if duoka splits it, three steps after the 20th are whole."""
    (tmp_path / "train.py").write_text(OWN_WRAPPER.replace("MODEL", model))
    done = duoka("run", "train.py", "--device", device, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [line.split("│") for line in done.stderr.splitlines() if "│ Whole" in line or "│ Head" in line]
    called = [[word.strip() for word in cells[3:7]] for cells in rows if cells[6].strip() != "0 / 0"]
    assert called == [row]
    assert "too few steps" not in done.stderr
    assert ("to compare" in done.stderr) == (row[3] == "26 / 4")
    assert ("the script wraps it for one device" in done.stderr) == (row[0] == "1")


def test_a_notebook_is_executed_and_saved_beside_the_original(tmp_path) -> None:
    pytest.importorskip("nbclient")
    source = SCRIPTS / "notebooks" / "classification.ipynb"
    book = tmp_path / source.name
    book.write_bytes(source.read_bytes())
    ended = duoka("run", source.name, "--device", "cpu:2", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert book.read_bytes() == source.read_bytes()
    parallel = texts(tmp_path / "classification.out.ipynb")
    assert len(json.loads((tmp_path / "classification.out.ipynb").read_text())["cells"]) == len(
        json.loads(book.read_text())["cells"]
    )
    plain = execute(book, tmp_path)
    assert numbers(parallel) == pytest.approx(numbers(plain), rel=1e-4)
    assert len(numbers(parallel)) > 3
    assert "wrapped by the script at line" in ended.stderr


def test_a_failing_cell_is_shown_and_earlier_outputs_are_saved(tmp_path) -> None:
    nbformat = pytest.importorskip("nbformat")
    cells = [nbformat.v4.new_code_cell(code) for code in ("print('first')", "1 / 0", "print('never')")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "n.ipynb")
    ended = duoka("run", "n.ipynb", "--device", "cpu:2", cwd=tmp_path)
    assert ended.returncode == 1
    assert "ZeroDivisionError" in ended.stderr
    assert texts(tmp_path / "n.out.ipynb")[0] == "first\n"


def texts(path: Path) -> list[str]:
    outputs = [output for cell in json.loads(path.read_text())["cells"] for output in cell.get("outputs", [])]
    return ["".join(output.get("text", "")) for output in outputs]


def numbers(message: list[str]) -> list[float]:
    return [
        float(word)
        for word in " ".join(message).replace(",", " ").split()
        if word.replace(".", "", 1).isdigit() and "." in word
    ]


def execute(path: Path, folder: Path) -> list[str]:
    """Run a notebook as its author would; in a process of its own, because nbclient leaves its event loop open."""
    code = (
        "import nbformat, nbclient, sys\n"
        "book = nbformat.read(sys.argv[1], as_version=4)\n"
        "nbclient.NotebookClient(book).execute()\n"
        "nbformat.write(book, 'plain.ipynb')"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], cwd=folder, check=True, capture_output=True)
    return texts(folder / "plain.ipynb")


SAVES_WHOLE_MODELS = """
import copy
import torch
from torch import nn

class Named(nn.DataParallel):
    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)

if __name__ == "__main__":
    torch.manual_seed(0)
    for number, kind in enumerate((nn.DataParallel, Named)):
        model, x = kind(nn.Linear(4, 2)), torch.ones(8, 4)
        best = copy.deepcopy(model)
        torch.save(model, f"{number}.pt")
        loaded = torch.load(f"{number}.pt", weights_only=False)
        for one in (model, best, loaded):
            print(type(one).__name__, *one.state_dict(), f"{one(x).sum().item():.5f}")
"""


def test_wrapped_models_are_copied_saved_and_loaded_without_duoka(tmp_path) -> None:
    (tmp_path / "saves.py").write_text(SAVES_WHOLE_MODELS)
    (tmp_path / "loads.py").write_text(
        "import sys, torch\n"
        "from saves import Named\n"
        "sys.modules['__main__'].Named = Named\n"
        "for n in (0, 1):\n"
        "    model = torch.load(f'{n}.pt', weights_only=False)\n"
        "    print(type(model).__name__, *model.state_dict(), f'{model(torch.ones(8, 4)).sum().item():.5f}')\n"
        "print('duoka' in sys.modules)\n"
    )

    def printed(*words: str) -> list[str]:
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return [line for line in done.stdout.splitlines() if line.startswith(("DataParallel", "Named", "False"))]

    plain = printed("saves.py")
    assert printed("-m", "duoka", "run", "saves.py", "--device", "cpu:2") == plain
    assert printed("loads.py") == [plain[0], plain[3], "False"]


@pytest.mark.parametrize("apart_s", [0.01, pytest.param(0.06, marks=pytest.mark.extended)])
def test_ctrl_c_twice_ends_without_a_traceback_of_duoka(apart_s: float, tmp_path) -> None:
    (tmp_path / "long.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "model = nn.Linear(8, 1).cuda()\n"
        "optimizer = torch.optim.SGD(model.parameters(), 0.01)\n"
        "for step in range(1_000_000):\n"
        "    optimizer.zero_grad()\n"
        "    model(torch.ones(32, 8).cuda()).sum().backward()\n"
        "    optimizer.step()\n"
        "    if step == 30:\n"
        "        print('going', flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "duoka", "run", "long.py", "--device", "cpu:2"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "going\n"
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(apart_s)
    _, err = process.communicate()
    assert process.returncode in (130, -signal.SIGINT)  # the second may come when Python itself is ending
    assert "duoka/" not in err
    assert "Exception ignored" not in err


def test_an_error_in_torch_shows_no_frame_of_duoka(tmp_path) -> None:
    (tmp_path / "wrong.py").write_text("import torch\ntorch.zeros(2) @ torch.zeros(3)\n")
    done = duoka("run", "wrong.py", "--device", "cpu:2", cwd=tmp_path)
    assert done.returncode == 1
    assert "device_remap.py" not in done.stderr
    assert 'wrong.py", line 2' in done.stderr
