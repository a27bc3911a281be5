"""Notebook runner, which executes all cells in a new kernel and saves the outputs in a second file."""

import signal
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from duoka.devices import resolve
from duoka.errors import ConfigError, StorageError
from duoka.malloc import keep_freed_memory
from duoka.script_runner.report import print_report
from duoka.script_runner.session import RunSession
from duoka.utils.files import atomic_write, check_writable, read_file
from duoka.utils.imports import import_optional
from duoka.utils.schema import check_form
from duoka.utils.text import first_line, shorten

MAX_BYTES = 500_000_000
"""Largest notebook that is read."""

_session: Any = None


def run_notebook(path: Path, spec: str, *, scale_batch: bool = False) -> tuple[int, Path, str]:
    """Execute a notebook with its models parallelized.

    Args:
        path: the ``.ipynb`` file, which stays unchanged.
        spec: the devices, in the device grammar.
        scale_batch: whether training loaders multiply their batch size by the number of devices.

    Returns:
        The exit status (1 if a cell raised), the file with the outputs, and the report.

    Raises:
        ConfigError: ``path`` is not a notebook, or its kernel is not installed.
        MissingDependencyError: nbclient or nbformat is not installed.
        StorageError: the outputs cannot be written; no cell has run.
    """
    nbformat = import_optional("nbformat", "notebook")
    nbclient = import_optional("nbclient", "notebook")
    book = _read(path, nbformat)
    _check_kernel(book, path)
    target = path.with_name(f"{path.stem}.out.ipynb")
    check_writable(target)
    client = nbclient.NotebookClient(book, timeout=None, resources={"metadata": {"path": str(path.resolve().parent)}})
    client.extra_arguments = ["--IPKernelApp.log_level=50"]  # without the kernel's own warnings
    status, report = 0, ""
    with client.setup_kernel():
        try:
            start = f"from duoka.script_runner import notebook as _duoka; _duoka.begin({spec!r}, {scale_batch!r})"
            _execute_hidden(client, nbformat, start)
            for index, cell in enumerate(book.cells):
                client.execute_cell(cell, index)
        except nbclient.exceptions.CellExecutionError as error:
            status, report = 1, f"{error}\n"
        except nbclient.exceptions.DeadKernelError:
            return 1, target, f"The notebook's kernel has died.\n{_save(book, target, nbformat)}"
        except KeyboardInterrupt:
            return 128 + signal.SIGINT, target, f"interrupted\n{_save(book, target, nbformat)}"
        not_saved = _save(book, target, nbformat)
        outputs = _execute_hidden(client, nbformat, f"_duoka.end(completed={status == 0})")
        report += "".join(output.get("text", "") for output in outputs) + not_saved
    return status or bool(not_saved), target, report


def begin(spec: str, scale_batch: bool) -> None:
    """Start the session, in the notebook's kernel."""
    global _session
    keep_freed_memory()
    _session = RunSession(resolve(spec).devices, scale_batch=scale_batch)
    _session.__enter__()


def end(*, completed: bool) -> None:
    """End the session and print its report, in the notebook's kernel."""
    from rich.console import Console

    _session.__exit__(None, None, None)
    out = Console(width=120, highlight=False, force_jupyter=False, color_system=None)
    print_report(_session.stats, out, completed=completed)


class _Kernel(TypedDict):
    name: str


class _Metadata(TypedDict):
    kernelspec: NotRequired[_Kernel]


class _Cell(TypedDict):
    cell_type: Literal["code", "markdown", "raw"]
    source: str
    metadata: dict[str, Any]
    outputs: NotRequired[list[dict[str, Any]]]


class _Book(TypedDict):
    """What the kernel's client reads of a notebook."""

    metadata: _Metadata
    cells: list[_Cell]


def _read(path: Path, nbformat: Any) -> Any:
    try:
        text = read_file(path, MAX_BYTES).decode()
    except FileNotFoundError:
        raise ConfigError(f"there is no notebook {str(path)!r}.") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"cannot read the notebook {str(path)!r}: {reason}") from error
    try:
        with warnings.catch_warnings(action="ignore"):  # of cells without an id, which get one
            book = nbformat.reads(text, as_version=4)
    except Exception as error:  # nbformat raises errors of many types
        reason = shorten(first_line(error), 200)
        raise ConfigError(f"{str(path)!r} is not a valid notebook: {reason}: save it again in Jupyter") from error
    remedy = "save it again in Jupyter"
    check_form(book, _Book, f"the notebook {str(path)!r}", remedy=remedy, error=ConfigError)
    return book


def _check_kernel(book: Any, path: Path) -> None:
    kernels = import_optional("jupyter_client.kernelspec", "notebook")
    name = book.metadata.get("kernelspec", {}).get("name", "python3")
    try:
        kernels.get_kernel_spec(name)
    except kernels.NoSuchKernel as error:
        raise ConfigError(
            f"the notebook {str(path)!r} names the kernel {shorten(name)!r}, which is not installed: choose another in Jupyter "
            "and save the notebook (`jupyter kernelspec list` shows them)"
        ) from error


def _save(book: Any, target: Path, nbformat: Any) -> str:
    """Save the notebook with its outputs, and return an error message, empty if there was no error."""
    try:
        with atomic_write(target) as file:
            file.write(nbformat.writes(book).encode())
    except StorageError as error:
        return f"The outputs are not saved: {error}\n"
    return ""


def _execute_hidden(client: Any, nbformat: Any, code: str) -> Sequence[Any]:
    """Execute code that is not part of the notebook, and return its outputs."""
    cell = nbformat.v4.new_code_cell(code)
    client.nb.cells.append(cell)
    try:
        client.execute_cell(cell, len(client.nb.cells) - 1, store_history=False)
    finally:
        client.nb.cells.pop()
    return list(cell.outputs)
