"""The fixture that fails a test for a leak: it finds each kind of leak, and none in a clean test."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from multiprocessing import resource_tracker
from pathlib import Path

from support.processes import children

LEAKING = """
import os, socket, subprocess, sys, tempfile, threading, time
import pytest
kept = []

def test_process(): kept.append(subprocess.Popen(["sleep", "20"]))
def test_zombie(): kept.append(subprocess.Popen(["true"]))
def test_thread(): threading.Thread(target=time.sleep, args=(8,), daemon=True).start()
def test_socket(): kept.append(socket.create_server(("127.0.0.1", 0)))
def test_variable(): os.environ["MASTER_PORT"] = "1"
def test_folder(): os.chdir("/")
def test_file(): tempfile.mkstemp(prefix="duoka-")
def test_group():
    import torch.distributed as dist
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
"""

CLEAN = """
import os, socket, subprocess, tempfile, threading
import pytest

def test_nothing(): pass
def test_everything_ended(monkeypatch, tmp_path):
    subprocess.run(["true"], check=True)
    thread = threading.Thread(target=print); thread.start(); thread.join()
    socket.create_server(("127.0.0.1", 0)).close()
    monkeypatch.setenv("X", "1"); monkeypatch.chdir(tmp_path)
    tempfile.TemporaryDirectory(prefix="duoka-").cleanup()
@pytest.mark.leaks_allowed
def test_marked(): os.environ["MARKED"] = "1"
"""


def run_tests(source: str, folder: Path) -> str:
    """Return what pytest prints for a test file ``source`` that has this suite's fixtures."""
    fixtures = Path(__file__).with_name("conftest.py").read_text()
    (folder / "conftest.py").write_text(f"{fixtures}\nfrom support import leaks\nleaks.GRACE_S = 0.3\n")
    (folder / "test_it.py").write_text(source)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-rE", str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120).stdout


def test_each_kind_of_leak_fails_its_test(tmp_path):
    shown = run_tests(LEAKING, tmp_path)
    names = re.findall(r"^def test_(\w+)", LEAKING, re.MULTILINE)
    assert re.findall(r"^ERROR test_it.py::test_(\w+)", shown, re.MULTILINE) == names, shown


def test_a_test_that_ends_what_it_starts_passes(tmp_path):
    assert "3 passed" in run_tests(CLEAN, tmp_path)


def test_a_thread_that_ends_while_its_children_are_listed_is_no_error(monkeypatch):
    resource_tracker.ensure_running()  # a permitted child, which an earlier version counted as a leak
    reads = []

    def read_text(path: Path) -> str:
        reads.append(path)
        raise FileNotFoundError(path) if len(reads) == 1 else ProcessLookupError(path)

    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, args=(60,))
    thread.start()
    monkeypatch.setattr(Path, "read_text", read_text)
    try:
        found = children()
    finally:
        monkeypatch.undo()
        stop.set()
        thread.join()
    assert found == children()
    assert len(reads) > 1 or sys.platform != "linux"
