"""Import layers: import-linter's contracts in ``pyproject.toml`` hold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_no_package_imports_from_a_higher_layer():
    program = (
        "import sys; from importlinter.cli import lint_imports_command as lint; sys.argv = ['lint-imports']; lint()"
    )
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", program, "--no-cache"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 kept, 0 broken" in done.stdout
