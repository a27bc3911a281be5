"""Worker processes on this machine: started on first use, kept warm, and ended with the process that started them.

``run_on_all`` runs one function on every device; a ``WorkerSession`` keeps workers for a series of requests;
``close_workers`` ends all workers before the process ends.
"""

from duoka.workers.pool import close_workers
from duoka.workers.run_on_all import run_on_all
from duoka.workers.worker_main import WorkerChannel
from duoka.workers.worker_session import WorkerSession

__all__ = ["WorkerChannel", "WorkerSession", "close_workers", "run_on_all"]
