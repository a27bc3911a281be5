"""``import duoka`` is fast and has no side effects, measured in real processes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import duoka

LATER = [
    "torchmetrics",
    "matplotlib",
    "rich",
    "jsonargparse",
    "sklearn",
    "torchvision",
    "psutil",
    "pynvml",
    "safetensors",
]

PROGRAM = """
import json, logging, os, pathlib, signal, sys, threading, warnings
import torch
def state():
    return {
        "children": [path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/children")],
        "threads": len(os.listdir("/proc/self/task")),
        "files": len(os.listdir("/proc/self/fd")),
        "environment": dict(os.environ),
        "handlers": [str(logging.getLogger(name).handlers) for name in ("", "duoka")],
        "levels": [logging.getLogger(name).level for name in ("", "duoka", "torch")],
        "signals": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)],
        "filters": len(warnings.filters),
        "hooks": [str(hook) for hook in (sys.excepthook, sys.displayhook, threading.excepthook)],
        "torch threads": torch.get_num_threads(),
        "seed": torch.initial_seed(),
        "cuda": torch.cuda.is_initialized(),
        "group": torch.distributed.is_initialized(),
    }
before, modules = state(), set(sys.modules)
import duoka
after, new = state(), sorted(set(sys.modules) - modules)
print(json.dumps({"before": before, "after": after, "new": new}))
"""


@pytest.fixture(scope="module")
def observed() -> dict:
    done = subprocess.run([sys.executable, "-W", "error", "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_importing_starts_nothing_and_changes_nothing(observed):
    assert observed["after"] == observed["before"]
    assert observed["before"]["cuda"] is False


def test_importing_loads_no_optional_dependency(observed):
    assert [name for name in observed["new"] if name.split(".")[0] in LATER] == []


def test_importing_after_torch_loads_the_package_alone(observed):
    assert observed["new"] == ["duoka"]


def test_importing_before_torch_works_too():
    subprocess.run([sys.executable, "-W", "error", "-c", "import duoka, torch"], check=True)


def test_every_public_name_exists_and_is_listed():
    assert sorted(duoka.__all__) == list(dict.fromkeys(sorted(duoka.__all__)))
    for name in duoka.__all__:
        assert getattr(duoka, name) is not None
        assert name in dir(duoka)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="lanch"):
        duoka.lanch  # noqa: B018


ALONE = """
import importlib, pkgutil, sys
import duoka
names = [part.name for part in pkgutil.iter_modules(duoka.__path__) if part.name != "__main__"]
for part in names:
    for name in [name for name in sys.modules if name.split(".")[0] == "duoka"]:
        del sys.modules[name]
    importlib.import_module(f"duoka.{part}")
print(*names)
"""


def test_every_package_can_be_imported_first():
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"checkpoint", "trainer", "cli"} <= set(done.stdout.split())
