"""``DataParallel``: one model on every device of this machine, driven by the user's own program."""

from __future__ import annotations

from duoka.data_parallel.module import DataParallel

__all__ = ["DataParallel"]
