"""The fixture that finds what a test leaves behind: it finds each kind, and nothing where nothing is."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import threading
from multiprocessing import resource_tracker
from pathlib import Path

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


def outcome(source: str, folder: Path) -> str:
    fixtures = Path(__file__).with_name("conftest.py").read_text()
    (folder / "conftest.py").write_text(fixtures.replace("GRACE_S = 3.0", "GRACE_S = 0.3"))
    (folder / "test_it.py").write_text(source)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-rE", str(folder)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    return done.stdout


def test_each_kind_of_leak_fails_its_test(tmp_path):
    said = outcome(LEAKING, tmp_path)
    names = re.findall(r"^def test_(\w+)", LEAKING, re.MULTILINE)
    assert re.findall(r"^ERROR test_it.py::test_(\w+)", said, re.MULTILINE) == names, said


def test_a_test_that_ends_what_it_starts_passes(tmp_path):
    assert "3 passed" in outcome(CLEAN, tmp_path)


def test_a_thread_that_ends_while_its_list_is_read_is_no_error(monkeypatch):
    spec = importlib.util.spec_from_file_location("fixtures", Path(__file__).with_name("conftest.py"))
    fixtures = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fixtures", fixtures)
    spec.loader.exec_module(fixtures)
    resource_tracker.ensure_running()  # a child that is allowed, and was once taken for one that leaked
    reads = []

    def read_text(path: Path) -> str:
        reads.append(path)
        raise FileNotFoundError(path) if len(reads) == 1 else ProcessLookupError(path)

    waiting = threading.Event()
    thread = threading.Thread(target=waiting.wait, args=(60,))
    thread.start()
    monkeypatch.setattr(Path, "read_text", read_text)
    try:
        children = fixtures.children()
    finally:
        monkeypatch.undo()
        waiting.set()
        thread.join()
    assert children == fixtures.children()
    assert len(reads) > 1 or sys.platform != "linux"
