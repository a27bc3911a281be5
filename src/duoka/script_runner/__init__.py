"""``duoka run``: runs an unchanged script or notebook on every device, and reports what that gained."""

from duoka.script_runner.child_processes import end_copies_of_script
from duoka.script_runner.dry_run import explain
from duoka.script_runner.notebook import run_notebook
from duoka.script_runner.script import Script
from duoka.script_runner.session import RunSession

__all__ = ["Script", "RunSession", "end_copies_of_script", "explain", "run_notebook"]
