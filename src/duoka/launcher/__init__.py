"""Running one function on every device: helpers of this process, or this process's place in a larger job."""

from __future__ import annotations

from duoka.launcher.api import launch

__all__ = ["launch"]
