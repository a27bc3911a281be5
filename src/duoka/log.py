"""The package's logger. The root logger and the user's handlers stay untouched."""

from __future__ import annotations

import logging

__all__ = ["logger"]

logger = logging.getLogger("duoka")
"""Child of nothing that duoka configures: a user decides with ``logging`` what is shown; warnings show by default."""
