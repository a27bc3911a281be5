"""``duoka run``: somebody's unchanged script or notebook on every device, and an account of what that brought."""

from __future__ import annotations

from duoka.script.explain import explain
from duoka.script.notebook import run_notebook
from duoka.script.program import Program
from duoka.script.session import Session

__all__ = ["Program", "Session", "explain", "run_notebook"]
