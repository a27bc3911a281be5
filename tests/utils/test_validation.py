"""Type checks of dataclass fields, and the message that names option, value and expectation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from duoka.errors import ConfigError
from duoka.utils.validation import check_field_types, check_number


@dataclass(frozen=True)
class Options:
    count: int = 1
    rate: float | None = None
    mode: Literal["fast", "slow"] = "fast"
    folder: str | Path | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    alias: InitVar[Any] = None

    def __post_init__(self, alias: Any) -> None:
        check_field_types(self)


def test_values_of_the_annotated_types_are_valid():
    Options(count=2, rate=1, mode="slow", folder=Path("here"), extra={"a": 1}, alias="anything")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": True}, "count=True .*an integer"),
        ({"count": 1.0}, r"count=1\.0 .*an integer"),
        ({"rate": "high"}, "rate='high' .*a number or none"),
        ({"mode": "fats"}, "mode='fats' .*one of fast, slow; did you mean 'fast'"),
        ({"folder": 3}, "folder=3 .*text or a path or none"),
        ({"extra": 3}, "extra=3 .*a dict"),
    ],
)
def test_a_value_of_another_type_is_an_error(options, message):
    with pytest.raises(ConfigError, match=message):
        Options(**options)


@pytest.mark.parametrize(("value", "limits"), [(2**63, r"0 or more and below 2\*\*63"), (-1, r"below 2\*\*63")])
def test_limits_of_a_number_are_in_the_message(value, limits):
    with pytest.raises(ConfigError, match=rf"seed={value} .*{limits}"):
        check_number("seed", value, 0, below=2**63)
