"""Electricity Transformer Temperature data: four files of two years, hourly or every 15 minutes, and the paper's split."""

from __future__ import annotations

from pathlib import Path

from duoka.errors import DataError
from duoka.recipes.datasets.download import RemoteFile, verify_md5

URL = "https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small/"
FILES = {
    "ETTh1": (2_589_657, "8381763947c85f4be6ac456c508460d6"),
    "ETTh2": (2_417_960, "51a229a3fc13579dd939364fefe9c7ab"),
    "ETTm1": (10_360_719, "82d6bd89109c63d075d99c1077b33f38"),
    "ETTm2": (9_677_236, "7687e47825335860bf58bccb31be0c56"),
}
"""Bytes and MD5 checksum of each file. Source: https://github.com/zhouhaoyi/ETDataset (CC BY-ND 4.0)."""
MONTH_HOURS = 30 * 24


def locate(name: str, root: str | Path, *, download: bool = True) -> Path:
    """Return the file of the set ``name`` in ``root``, downloaded if it is missing.

    Raises DataError if the file is missing and ``download`` is off, or its checksum is wrong.
    """
    remote = RemoteFile(f"{URL}{name}.csv", *FILES[name])
    path = Path(root) / remote.file_name
    if path.exists():
        remedy = "delete it to download it anew, or give your own file with --csv"
        with path.open("rb") as file:
            verify_md5(file, path, remote.md5, size=remote.size, remedy=remedy)
        return path
    if not download:
        remedy = f"allow it with --download true, or fetch {remote.url}"
        raise DataError(f"{path} is not there, and download is off: {remedy}")
    return remote.download(path.parent)


def part_ends(rows: int, steps_per_hour: int) -> tuple[int, int, int] | None:
    """Return the ends of training, validation and test in the paper: after 12, 16 and 20 months of 30 days.

    ``None`` if there are not enough rows.

    >>> part_ends(17_420, 1)
    (8640, 11520, 14400)
    """
    month = MONTH_HOURS * steps_per_hour
    ends = (12 * month, 16 * month, 20 * month)
    return ends if rows >= ends[-1] else None
