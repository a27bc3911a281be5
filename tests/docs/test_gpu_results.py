"""The sections about GPUs in ``docs/performance.md`` and its translation are those of the files in ``benchmarks/results``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_pages_show_the_results_of_all_files() -> None:
    command = [sys.executable, "benchmarks/gpu_page.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "changed: nothing\n"), done.stderr
