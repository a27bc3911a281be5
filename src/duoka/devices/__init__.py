"""Devices: the grammar that names them, what is there, who uses it, and why a choice was made."""

from __future__ import annotations

from duoka.devices.choice import Choice, resolve
from duoka.devices.facts import DeviceFacts, DeviceProcess, Link
from duoka.devices.survey import describe

__all__ = ["Choice", "DeviceFacts", "DeviceProcess", "Link", "describe", "resolve"]
