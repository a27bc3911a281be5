"""Modules in the working folder: neither the command nor a process that it starts imports them."""

import os
import subprocess
import sys

import torch

from duoka.cli import run

SHADOWED = (
    "yaml", "numpy", "torch", "cloudpickle", "psutil", "rich", "jsonargparse", "pickle", "multiprocessing", "subprocess",
    "pynvml", "safetensors", "matplotlib", "torchmetrics", "random", "json", "signal", "shtab",
)  # fmt: skip


def test_no_module_of_the_working_folder_is_imported(tmp_path):
    for name in SHADOWED:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'a').write({name!r} + '\\n')\n")
    words = [sys.executable, "-m", "duoka", "check", "--device", "cpu:2"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "imported").exists()


def test_a_restart_with_fewer_gpus_imports_nothing_from_the_working_folder(monkeypatch):
    started = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(os, "execve", lambda program, words, environment: started.append((words, environment)))
    run._restart_with_visible_devices([torch.device("cuda:1")], ["train.py"])
    ((words, environment),) = started
    assert words == [sys.executable, "-P", "-m", "duoka", "run", "train.py"]
    assert environment["CUDA_VISIBLE_DEVICES"] == "1"
