"""The package's logger. duoka does not change the root logger or the user's handlers."""

import logging

logger = logging.getLogger("duoka")
"""A user configures it with ``logging``; by default it prints warnings."""
