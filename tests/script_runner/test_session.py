"""``RunSession`` replaces functions of torch for a whole process, so its tests run in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_sessions_in_a_fresh_process() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("session_checks.py"))],
        env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
