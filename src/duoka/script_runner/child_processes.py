"""Processes that a script starts: a note about those without the emulation, and the end of the script's own copies."""

import contextlib
import os
import subprocess
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import psutil

from duoka.script_runner.patching import Patches
from duoka.script_runner.run_stats import RunStats
from duoka.script_runner.source_scan import caller_location, is_called_by_script

_END_TIMEOUT_S = 3.0


def note_python_processes(patches: Patches, stats: RunStats) -> None:
    """Add a note about each place that starts Python, which has no emulated CUDA there, until the patches end."""

    def init(original: Callable[..., None], process: Any, args: Any, *others: Any, **options: Any) -> None:
        original(process, args, *others, **options)
        if is_called_by_script() and _is_python(args):
            stats.add_note(
                f"The process that the script starts at {caller_location()} runs without duoka: it sees the CPU, and no "
                "emulated GPUs."
            )

    patches.wrap(subprocess.Popen, "__init__", init)


def end_copies_of_script(names: Collection[str]) -> None:
    """End processes below this one that run the script, known by these names: launchers start them for more devices."""
    children = psutil.Process().children(recursive=True)
    copies = [child for child in children if not set(names).isdisjoint(_command(child))]
    for child in copies:
        with contextlib.suppress(psutil.Error):
            child.terminate()
    for child in psutil.wait_procs(copies, _END_TIMEOUT_S)[1]:
        with contextlib.suppress(psutil.Error):
            child.kill()


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # it has ended
        return []


def _is_python(args: Any) -> bool:
    words = args.split() if isinstance(args, str) else [args] if isinstance(args, bytes | os.PathLike) else list(args)
    return bool(words) and Path(os.fsdecode(words[0])).name.startswith("python")
