"""Electricity Transformer Temperature data: four files of two years, hourly or every 15 minutes."""

from __future__ import annotations

from pathlib import Path

from duoka.recipes.datasets.download import RemoteFile

URL = "https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small/"
FILES = {
    "ETTh1": (2_589_657, "8381763947c85f4be6ac456c508460d6"),
    "ETTh2": (2_417_960, "51a229a3fc13579dd939364fefe9c7ab"),
    "ETTm1": (10_360_719, "82d6bd89109c63d075d99c1077b33f38"),
    "ETTm2": (9_677_236, "7687e47825335860bf58bccb31be0c56"),
}
"""Bytes and MD5 checksum of each file. Source: https://github.com/zhouhaoyi/ETDataset (CC BY-ND 4.0)."""


def locate(name: str, root: str | Path, *, download: bool = True) -> Path:
    """Return the file of the set ``name`` in ``root``, downloaded if it is missing.

    Raises DataError if the file is missing and ``download`` is off, or its checksum is wrong.
    """
    remote = RemoteFile(f"{URL}{name}.csv", *FILES[name], alternative=", or give your own file with --csv")
    return remote.locate(Path(root), download=download)
