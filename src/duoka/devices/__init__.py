"""Devices of this machine: the grammar that names them, their use, and the selection with its reason."""

from duoka.devices.info import DeviceInfo, DeviceProcess, Link
from duoka.devices.inventory import describe
from duoka.devices.selection import DeviceSelection, resolve
from duoka.devices.spec import DeviceSpec

__all__ = ["DeviceInfo", "DeviceProcess", "DeviceSelection", "DeviceSpec", "Link", "describe", "resolve"]
