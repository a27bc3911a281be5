"""Helper processes: started on demand, kept warm, and gone when the process that they help is gone.

``run_job`` runs one task on every device; ``close_helpers`` ends the warm helpers before the process ends.
"""

from __future__ import annotations

from duoka.team.job import run_job
from duoka.team.pool import acquire, close_helpers, release

__all__ = ["acquire", "close_helpers", "release", "run_job"]
