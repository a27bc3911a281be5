"""Files of Python and of installed libraries, as opposed to the user's code."""

import functools
import sysconfig
from collections.abc import Iterator
from pathlib import Path

_PACKAGE_FOLDERS = ("site-packages", "dist-packages")


@functools.cache
def is_library_file(file: str) -> bool:
    """Return whether ``file`` belongs to Python or to an installed library.

    A library is in a folder for packages, or beside the record of its installation, as after ``pip install --target``.
    The source of an editable installation is neither.
    """
    path = Path(file)
    if file.startswith(_standard_library()) or any(folder in path.parts for folder in _PACKAGE_FOLDERS):
        return True
    return any(path.relative_to(parent).parts[0] in _installed_names(parent) for parent in path.parents)


@functools.cache
def _standard_library() -> tuple[str, ...]:
    return tuple(f"{sysconfig.get_path(kind)}/" for kind in ("stdlib", "platstdlib"))


@functools.cache
def _installed_names(folder: Path) -> frozenset[str]:
    """Return the files and folders that installations into ``folder`` have recorded there."""
    return frozenset(_recorded_names(folder))


def _recorded_names(folder: Path) -> Iterator[str]:
    try:
        records = [path.read_text(encoding="utf-8", errors="replace") for path in folder.glob("*.dist-info/RECORD")]
    except OSError:  # no permission
        return
    for record in records:
        yield from (line.partition("/")[0].partition(",")[0] for line in record.splitlines())
