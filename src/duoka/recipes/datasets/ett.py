"""The Electricity Transformer Temperature set: four files of two years, hourly or every 15 minutes, and the paper's split."""

from __future__ import annotations

from pathlib import Path

from duoka.errors import DataError
from duoka.recipes.datasets.download import check, fetch

__all__ = ["FILES", "borders", "locate"]

URL = "https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small/"
FILES = {
    "ETTh1": (2_589_657, "8381763947c85f4be6ac456c508460d6"),
    "ETTh2": (2_417_960, "51a229a3fc13579dd939364fefe9c7ab"),
    "ETTm1": (10_360_719, "82d6bd89109c63d075d99c1077b33f38"),
    "ETTm2": (9_677_236, "7687e47825335860bf58bccb31be0c56"),
}
"""Each file's bytes and MD5 checksum. Source: https://github.com/zhouhaoyi/ETDataset (CC BY-ND 4.0)."""
MONTH_HOURS = 30 * 24


def locate(name: str, root: str | Path, *, download: bool = True) -> Path:
    """Return the file of ``name``, one of ``FILES``, below ``root``; downloaded and checked where it is not there.

    Raises:
        DataError: it is not there and ``download`` is off, or what is there or came has another checksum.

    """
    path = Path(root) / f"{name}.csv"
    size, md5 = FILES[name]
    if path.exists():
        check(path, size=size, md5=md5, remedy="delete it to download it anew, or give your own file with --csv")
    elif download:
        fetch(f"{URL}{name}.csv", path, size=size, md5=md5)
    else:
        remedy = f"allow it with --download true, or fetch {URL}{name}.csv"
        raise DataError(f"{path} is not there, and download is off: {remedy}")
    return path


def borders(rows: int, steps_per_hour: int) -> tuple[int, int, int] | None:
    """Return where training, validation and test end in the paper: after 12, 16 and 20 months of 30 days.

    ``None`` where there are not as many rows.

    >>> borders(17_420, 1)
    (8640, 11520, 14400)
    """
    month = MONTH_HOURS * steps_per_hour
    ends = (12 * month, 16 * month, 20 * month)
    return ends if rows >= ends[-1] else None
