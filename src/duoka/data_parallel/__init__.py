"""``DataParallel``: one model on every device of this machine, driven by the user's own process.

The script runner uses ``Controller`` for models that a script does not wrap, and the functions on
wrappers (``devices_of`` and others) for those that it does.
"""

from duoka.data_parallel.controller import Controller
from duoka.data_parallel.module import DataParallel, devices_of, overridden_steps, restore_from_state, state_of

__all__ = ["Controller", "DataParallel", "devices_of", "overridden_steps", "restore_from_state", "state_of"]
