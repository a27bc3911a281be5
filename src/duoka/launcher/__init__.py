"""``launch``: one function on every device, in workers of this process or in the processes of a cluster job."""

from duoka.launcher.api import launch

__all__ = ["launch"]
