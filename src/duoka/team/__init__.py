"""Helper processes: started on demand, kept warm, and gone when the process that they help is gone.

``run_job`` runs one task on every device; a ``Conversation`` keeps helpers for one who asks and is answered again and
again; ``close_helpers`` ends all helpers before the process ends.
"""

from __future__ import annotations

from duoka.team.conversation import Conversation, Line
from duoka.team.job import run_job
from duoka.team.pool import acquire, close_helpers, release

__all__ = ["Conversation", "Line", "acquire", "close_helpers", "release", "run_job"]
