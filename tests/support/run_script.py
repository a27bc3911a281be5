"""Runs a script plain, or under ``duoka run``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def run_plain(folder: Path, source: str) -> subprocess.CompletedProcess[str]:
    """Write ``t.py`` into a folder and run it, as Python does."""
    (folder / "t.py").write_text(source)
    return _run(folder, "t.py")


def run_duoka(folder: Path, source: str, *words: str, device: str = "cpu:2") -> subprocess.CompletedProcess[str]:
    """Write ``t.py`` into a folder and run it under ``duoka run``; ``words`` stand behind it."""
    (folder / "t.py").write_text(source)
    return _run(folder, "-m", "duoka", "run", "--device", device, "t.py", *words)


def _run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], cwd=folder, capture_output=True, text=True, check=False, timeout=300
    )
