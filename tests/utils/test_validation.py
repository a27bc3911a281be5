"""Type checks of dataclass fields, and the message that names option, value and expectation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from duoka.errors import ConfigError
from duoka.utils.validation import check_field_types, check_number, invalid_option, parse_value


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


@pytest.mark.parametrize(
    ("text", "hint", "value"),
    [
        ("12", int, 12), ("-3", int, -3), ("1_000", int, 1000), ("1e-3", float, 0.001), ("1", float, 1.0), (".5", float, 0.5),
        (".inf", float, float("inf")), ("true", bool, True), ("No", bool, False), ("fast", Literal["fast", "slow"], "fast"),
        ("2", Literal[1, 2], 2),
        ("fit", int | Literal["fit"], "fit"), ("3", int | Literal["fit"] | None, 3),
        ("null", int | None, None), ("null", str | None, "null"), ("007", str, "007"),
    ],
)  # fmt: skip
def test_the_type_of_an_option_decides_how_its_text_is_read(text, hint, value):
    read = parse_value(text, hint)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("9" * 5000, int), ("9" * 5000, float), ("0b_", int), ("0x10", int), ("1.0", int), ("1__0", int), ("", int),
        ("", float), ("2001-99-99", float), ("e5", float), ("maybe", bool), ("", bool), ("Fast", Literal["fast"]),
        ("null", int),
    ],
)  # fmt: skip
def test_a_text_that_is_no_value_of_the_type_is_refused(text, hint):
    with pytest.raises((ValueError, KeyError)):
        parse_value(text, hint)


def test_a_message_shows_the_ends_of_a_long_value():
    assert len(str(invalid_option("seed", "9" * 5000, "an integer"))) < 200
