"""Checks of option values, and the one form of message for a value that is not valid."""

import contextlib
import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from duoka.errors import ConfigError
from duoka.utils.text import did_you_mean, shorten

_TRUTHS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_INTEGER = re.compile(r"[-+]?[0-9][0-9_]{0,39}")
_NUMBER = re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)(e[-+]?[0-9]+)?|[-+]?\.?inf|\.?nan", re.IGNORECASE)
_LONGEST_NUMBER = 100


def invalid_option(name: str, value: object, expected: str, hint: str = "") -> ConfigError:
    """Return the error for an option whose value is not valid.

    >>> print(invalid_option("lr", -1, "a number above 0", "0.001 suits Adam"))
    lr=-1 is not valid: it must be a number above 0; 0.001 suits Adam
    """
    shown = shorten(repr(value))
    return ConfigError(f"{name}={shown} is not valid: it must be {expected}{f'; {hint}' if hint else ''}")


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raise ``ConfigError`` unless ``value`` is one of ``choices``; the message suggests the closest."""
    if value not in choices:
        expected = f"one of {', '.join(str(choice) for choice in choices)}"
        raise invalid_option(name, value, expected, did_you_mean(value, choices))


def check_integer(name: str, value: object, least: int) -> None:
    """Raise ``ConfigError`` unless ``value`` is an integer of at least ``least``; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise invalid_option(name, value, f"an integer, {least} or more")


def check_number(
    name: str, value: object, least: float = 0, *, exclusive: bool = False, below: float = math.inf
) -> None:
    """Raise ``ConfigError`` unless ``value`` is a finite number in the range; ``exclusive`` shuts ``least`` out."""
    limits = f"above {least:g}" if exclusive else f"{least:g} or more"
    if below < math.inf:
        limits += f" and below {'2**63' if below == 2**63 else f'{below:g}'}"
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not (least < value < below if exclusive else least <= value < below):  # type: ignore[operator]
        raise invalid_option(name, value, f"a finite number, {limits}")


def check_field_types(config: Any) -> None:
    """Raise ``ConfigError`` unless every field of a dataclass has a value of its annotated type."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        name, hint, value = field.name, hints[field.name], getattr(config, field.name)
        if not fits(value, hint):
            raise invalid_option(name, value, describe_type(hint), did_you_mean(value, typing.get_args(hint)))


def parse_value(text: str, hint: Any) -> Any:
    """Return an option's value from its text. The option's type alone decides how the text is read.

    >>> parse_value("1e-3", float | None), parse_value("null", int | None), parse_value("007", str)
    (0.001, None, '007')

    Raises:
        ValueError, KeyError: the text is no value of the type ``hint``.
    """
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        parts = typing.get_args(hint)
        if text == "null" and type(None) in parts and str not in parts:
            return None
        return _parse_any(text, [part for part in parts if part is not type(None)])
    if hint is str:
        return text
    if typing.get_origin(hint) is typing.Literal:
        return {str(choice): choice for choice in typing.get_args(hint)}[text]
    if hint is bool:
        return _TRUTHS[text.lower()]
    pattern = _INTEGER if hint is int else _NUMBER
    if len(text) > _LONGEST_NUMBER or not pattern.fullmatch(text):
        raise ValueError(f"{shorten(text)!r} is no number")
    return int(text) if hint is int else float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _parse_any(text: str, hints: Sequence[Any]) -> Any:
    """Return a value of the first type that accepts the text."""
    for hint in hints:
        with contextlib.suppress(ValueError, KeyError):
            return parse_value(text, hint)
    raise ValueError(f"{shorten(text)!r} is no value of the option")


def describe_type(hint: Any) -> str:
    """Return a type annotation in plain English.

    >>> describe_type(int | None), describe_type(typing.Literal["a", "b"])
    ('an integer or none', 'one of a, b')
    """
    words = {
        int: "an integer",
        float: "a number",
        bool: "true or false",
        str: "text",
        type(None): "none",
        Path: "a path",
    }
    if hint in words:
        return words[hint]
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {', '.join(map(str, typing.get_args(hint)))}"
    if typing.get_origin(hint) is Mapping:
        return "a dict"
    return " or ".join(describe_type(part) for part in typing.get_args(hint)) or str(hint)


def fits(value: Any, hint: Any) -> bool:
    """Return whether ``value`` has the type ``hint``; an int is a float too, and a bool is neither."""
    if hint is Any:
        return True
    if typing.get_origin(hint) is typing.Literal:
        return value in typing.get_args(hint)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return any(fits(value, part) for part in typing.get_args(hint))
    if hint is Path or typing.get_origin(hint) is Mapping:
        return isinstance(value, hint if hint is Path else Mapping)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is hint
