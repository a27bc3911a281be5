"""A notebook run from its first cell to its last, in a kernel of its own, its outputs saved beside it."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from duoka.errors import ConfigError, StorageError
from duoka.malloc import keep_freed_memory
from duoka.utils.files import atomic_write, check_writable

__all__ = ["begin", "end", "run_notebook"]

_session: Any = None


def run_notebook(path: Path, spec: str, *, scale_batch: bool = False) -> tuple[int, Path, str]:
    """Execute a notebook with its models shared out.

    Args:
        path: the ``.ipynb`` file; it is not changed.
        spec: the devices, in the device grammar.
        scale_batch: whether training loaders get batches as many times as large.

    Returns:
        The exit status (1 where a cell raised), the file with the outputs, and the stats of the run.

    Raises:
        ConfigError: there is no such notebook, or nbclient is not installed.
        StorageError: the outputs could not be saved; nothing was run.

    """
    try:
        import nbformat
        from nbclient import NotebookClient
        from nbclient.exceptions import CellExecutionError, DeadKernelError
    except ImportError as error:
        raise ConfigError(f"running a notebook needs {error.name}: pip install 'duoka[notebook]'") from error
    book = _read(path, nbformat)
    target = path.with_name(f"{path.stem}.out.ipynb")
    check_writable(target)
    client = NotebookClient(book, timeout=None, resources={"metadata": {"path": str(path.resolve().parent)}})
    client.extra_arguments = ["--IPKernelApp.log_level=50"]  # the kernel's own warnings are nobody's news
    status, report = 0, ""
    with client.setup_kernel():
        try:
            _hidden(
                client,
                nbformat,
                f"from duoka.script_runner import notebook as _duoka; _duoka.begin({spec!r}, {scale_batch!r})",
            )
            for index, cell in enumerate(book.cells):
                client.execute_cell(cell, index)
        except CellExecutionError as error:
            status, report = 1, f"{error}\n"
        except DeadKernelError:
            return 1, target, f"The notebook's kernel has died.\n{_saved(book, target, nbformat)}"
        except KeyboardInterrupt:
            return 128 + signal.SIGINT, target, f"interrupted\n{_saved(book, target, nbformat)}"
        unsaved = _saved(book, target, nbformat)
        outputs = _hidden(client, nbformat, f"_duoka.end(completed={status == 0})")
        report += "".join(output.get("text", "") for output in outputs) + unsaved
    return status or bool(unsaved), target, report


def _saved(book: Any, target: Path, nbformat: Any) -> str:
    """Save the notebook with its outputs; returns what went wrong, empty if nothing did."""
    try:
        with atomic_write(target) as file:
            file.write(nbformat.writes(book).encode())
    except StorageError as error:
        return f"The outputs are not saved: {error}\n"
    return ""


def begin(spec: str, scale_batch: bool) -> None:
    """Start sharing out, in the notebook's kernel."""
    global _session
    from duoka.devices import resolve
    from duoka.script_runner.session import RunSession

    keep_freed_memory()
    _session = RunSession(resolve(spec).devices, scale_batch=scale_batch)
    _session.__enter__()


def end(*, completed: bool) -> None:
    """Print the stats, in the notebook's kernel."""
    from rich.console import Console

    from duoka.script_runner.report import print_report

    _session.__exit__(None, None, None)
    print_report(
        _session.stats,
        Console(width=120, highlight=False, force_jupyter=False, color_system=None),
        completed=completed,
    )


def _hidden(client: Any, nbformat: Any, code: str) -> Sequence[Any]:
    """Execute code that is not part of the notebook and return its outputs."""
    cell = nbformat.v4.new_code_cell(code)
    client.nb.cells.append(cell)
    try:
        client.execute_cell(cell, len(client.nb.cells) - 1, store_history=False)
    finally:
        client.nb.cells.pop()
    return list(cell.outputs)


def _read(path: Path, nbformat: Any) -> Any:
    try:
        return nbformat.read(path, as_version=4)
    except FileNotFoundError:
        raise ConfigError(f"there is no notebook {str(path)!r}.") from None
    except (json.JSONDecodeError, UnicodeDecodeError, nbformat.reader.NotJSONError, AttributeError) as error:
        raise ConfigError(f"{str(path)!r} is not a notebook that can be read: {error}") from error
