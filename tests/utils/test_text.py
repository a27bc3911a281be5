"""Commands that messages name: they start the installation that prints them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import duoka
from duoka.utils.text import duoka_command


def make_script(folder: Path) -> Path:
    """Create an executable ``duoka`` in ``folder``."""
    folder.mkdir(parents=True)
    script = folder / "duoka"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    return script


def test_printed_command_runs_in_a_shell_in_the_same_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = subprocess.run(duoka_command("--version"), shell=True, capture_output=True, text=True, timeout=60)
    assert ran.stdout == f"duoka {duoka.__version__}\n"


def test_command_is_plain_only_if_the_shell_finds_the_running_one(tmp_path, monkeypatch):
    own, other = make_script(tmp_path / ".venv" / "bin"), make_script(tmp_path / "other")
    link = tmp_path / "links" / "duoka"
    link.parent.mkdir()
    link.symlink_to(own)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(own.with_name("python")))
    for path, expected in ((own, "duoka"), (link, "duoka"), (other, ".venv/bin/duoka")):
        monkeypatch.setenv("PATH", str(path.parent))
        assert duoka_command("eval", Path("runs/a run")) == f"{expected} eval 'runs/a run'"
    monkeypatch.chdir(tmp_path / "other")
    assert duoka_command("check") == f"{own} check"
    monkeypatch.setattr(sys, "argv", [str(other), "train"])
    assert duoka_command("check") == "duoka check"


def test_command_without_an_installed_script_names_python(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert duoka_command("check") == f"{tmp_path / 'python'} -m duoka check"
