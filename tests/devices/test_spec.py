"""The device grammar: invalid specifications, and ``device=`` beside ``devices=``."""

from __future__ import annotations

from typing import Any

import pytest

from duoka.devices.spec import parse, reconcile
from duoka.errors import ConfigError, DeviceError


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("0-", "did you mean '0'"),
        ("-3", "negative"),
        (-1, "negative"),
        ("cuda:-1", "negative"),
        ("3-0", "'0-3'"),
        ("cpu:0", "'cpu' for the CPU"),
        ("idle:0", "1 to 1024"),
        ("cpu:5000", "1 to 1024"),
        ("0-9999", "at most 1024"),
        ("99999999999999999999", "not valid"),
        ("gpu0", "did you mean '0'"),
        ("cuda 1", "did you mean '1'"),
        ("cpu4", "did you mean 'cpu:4'"),
        ("gpus", "did you mean 'gpu'"),
        ("idel", "did you mean 'idle'"),
        ("", "empty"),
        ("0,", "empty"),
        ("²", "not valid"),
        ("all,0", "different kinds"),
        ("0,cpu", "different kinds"),
        ("cuda:0,xpu:1", "cuda and xpu"),
        ([], "empty list"),
        ([[0]], "a list"),
        (True, "bool"),
        (1.0, "float"),
        ({}, "dict"),
    ],
)
def test_an_invalid_specification_is_an_error_with_a_suggestion(spec: Any, message: str) -> None:
    with pytest.raises(DeviceError, match="(?i)" + message.replace("(", r"\(")):
        parse(spec)


@pytest.mark.parametrize(
    ("device", "devices", "expected"),
    [
        (None, None, "auto"),
        ("cpu:2", None, "cpu:2"),
        (None, 0, 0),
        ("0,1", [0, 1], [0, 1]),
        ("CPU:2", "cpu:2", "cpu:2"),
    ],
)
def test_device_and_devices_are_two_spellings_of_one_option(device: Any, devices: Any, expected: Any) -> None:
    assert reconcile(device, devices) == expected


def test_device_and_devices_that_differ_are_an_error() -> None:
    with pytest.raises(ConfigError, match="device='0' and devices='1'"):
        reconcile("0", "1")
