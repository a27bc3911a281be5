"""Helper processes: started on demand, kept warm, and gone when the process that they help is gone.

``run_job`` runs one task on every device; a ``Conversation`` keeps helpers for one who asks and is answered again and
again; ``close_workers`` ends all helpers before the process ends.
"""

from __future__ import annotations

from duoka.workers.pool import acquire, close_workers, release
from duoka.workers.run_on_all import run_job
from duoka.workers.worker_session import WorkerChannel, WorkerSession

__all__ = ["WorkerSession", "WorkerChannel", "acquire", "close_workers", "release", "run_job"]
