"""Checks of data that were read from a file against the form that they must have; a message names the key's path."""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from duoka.errors import DataError, DuokaError
from duoka.utils.files import read_file
from duoka.utils.text import first_line, shorten
from duoka.utils.validation import describe_type

T = TypeVar("T")
MAX_JSON_BYTES = 200_000_000
_UNIONS = (types.UnionType, typing.Union)


def read_json(path: Path, form: type[T], remedy: str) -> T:
    """Return the content of a JSON file, which has the form ``form``: see ``check_form``.

    Raises DataError with the fault and ``remedy`` if the file is missing, is not JSON, or has another form.
    """
    return parse_json(read_text(path, remedy), form, str(path), remedy)


def read_text(path: Path, remedy: str) -> str:
    """Return the text of a file. Raises DataError with ``remedy`` if it is missing, too large, or not UTF-8."""
    try:
        return read_file(path, MAX_JSON_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise DataError(f"cannot read {path}: {reason}: {remedy}") from error


def parse_json(text: str, form: type[T], where: str, remedy: str) -> T:
    """Return what a JSON text holds; ``where`` names it. Raises as ``read_json`` does."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # an integer of over 4,300 digits is a ValueError, too
        raise DataError(f"cannot read {where}: it is not JSON: {shorten(first_line(error))}: {remedy}") from error
    check_form(value, form, where, remedy=remedy)
    return typing.cast("T", value)


def check_form(value: Any, form: Any, where: str, *, remedy: str, error: type[DuokaError] = DataError) -> None:
    """Raise ``error`` unless ``value`` has the form of a type annotation.

    Forms are ``int``, ``float`` (an int too, and finite), ``str``, ``bool``, classes, ``None``, ``Any``, unions,
    ``Literal``, ``list[X]``, ``tuple[X, ...]`` and ``tuple[X, Y]`` (lists too), ``dict[K, X]``, and ``TypedDict`` classes,
    whose further keys are not looked at.

    Args:
        value: what a file holds.
        form: the annotation.
        where: the name of the file in the message, which goes on with the path of the first key that does not fit.
        remedy: the end of the message.
        error: the class of the exception.
    """
    if fault := _fault(value, form, ""):
        raise error(f"{where}: {fault}: {remedy}")


def _fault(value: Any, form: Any, path: str) -> str:
    """Return the first key that does not fit, with its value and what it must be; empty if all fit."""
    origin, arguments = typing.get_origin(form), typing.get_args(form)
    if typing.is_typeddict(form) and isinstance(value, Mapping):
        if others := [key for key in value if not isinstance(key, str)]:
            return f"{_named(path)} has the key {shorten(repr(others[0]))}; keys must be text"
        hints = typing.get_type_hints(form, include_extras=True)
        optional = {key: typing.get_args(hint)[0] for key, hint in hints.items() if _is_optional(hint)}
        if missing := [key for key in hints if key not in value and key not in optional]:
            return f"{_named(path)} has no key {missing[0]!r}"
        present = [(key, optional.get(key, hint)) for key, hint in hints.items() if key in value]
        return _first(_fault(value[key], hint, f"{path}.{key}" if path else key) for key, hint in present)
    if origin in _UNIONS:
        faults = [_fault(value, part, path) for part in arguments]
        if all(faults):  # the fault within a part of the right kind says more than that of the whole
            return max(faults, key=lambda fault: fault.partition(" ")[0].count(".") + fault.count("["))
        return ""
    if origin is dict and isinstance(value, Mapping):
        return _first(
            _fault(key, arguments[0], f"{path}: the key {shorten(repr(key))}")
            or _fault(one, arguments[1], f"{path}.{shorten(str(key))}" if path else shorten(str(key)))
            for key, one in value.items()
        )
    if origin in (list, tuple) and isinstance(value, list | tuple):
        parts = arguments[:1] * len(value) if origin is list or arguments[1:] == (...,) else arguments
        if len(parts) != len(value):
            return f"{_named(path)} has {len(value)} items; it must have {len(parts)}"
        return _first(
            _fault(one, part, f"{path}[{at}]") for at, (one, part) in enumerate(zip(value, parts, strict=True))
        )
    return (
        "" if _fits(value, form, origin) else f"{_named(path)} is {shorten(repr(value))}; it must be {_describe(form)}"
    )


def _fits(value: Any, form: Any, origin: Any) -> bool:
    """Return whether a value fits a form without parts."""
    if form is Any:
        return True
    if origin is typing.Literal:
        return value in typing.get_args(form)
    if origin is not None or typing.is_typeddict(form):  # a mapping or a list, which the value is not
        return False
    if form in (None, type(None)):
        return value is None
    if form is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is form if form in (int, str, bool) else isinstance(value, form)


def _is_optional(hint: Any) -> bool:
    """Return whether a key may be missing; the class itself does not know if its annotations are text."""
    return typing.get_origin(hint) is typing.NotRequired


def _first(faults: Any) -> str:
    return next(filter(None, faults), "")


def _named(path: str) -> str:
    return path or "the content"


def _describe(form: Any) -> str:
    """Return a form in plain English."""
    origin = typing.get_origin(form)
    if origin is dict or typing.is_typeddict(form):
        return "a mapping of keys and values"
    if origin in (list, tuple):
        return "a list"
    if origin in _UNIONS:
        return " or ".join(map(_describe, typing.get_args(form)))
    if form is float:
        return "a finite number"
    described = describe_type(form)
    return f"a {form.__name__}" if described == str(form) and isinstance(form, type) else described


def template_fault(value: Any, template: Any, path: str) -> str:
    """Return how saved state differs in form from the ``template``, the present state of the same object.

    The same keys, types, and lengths of lists are asked of both; an int and a float stand for each other, and a mapping
    whose keys are no texts may have other keys. Empty if there is no difference.
    """
    if isinstance(template, dict) and template and all(isinstance(key, str) for key in template):
        if not isinstance(value, Mapping) or value.keys() != template.keys():
            keys = sorted(map(str, set(value) ^ set(template))) if isinstance(value, Mapping) else []
            return f"{path} has other keys than it must have ({', '.join(keys[:5]) or type(value).__name__})"
        return _first(template_fault(value[key], one, f"{path}.{key}") for key, one in template.items())
    if isinstance(template, list | tuple):
        if not isinstance(value, list | tuple) or len(value) != len(template):
            return f"{path} is {shorten(repr(value))}; it must be a list of {len(template)}"
        pairs = enumerate(zip(value, template, strict=True))
        return _first(template_fault(one, other, f"{path}[{at}]") for at, (one, other) in pairs)
    if isinstance(template, dict) and isinstance(value, Mapping):
        kinds = {type(one) for pair in template.items() for one in pair}
        odd = [one for pair in value.items() for one in pair if type(one) not in kinds]
        return f"{path} has {shorten(repr(odd[0]))}, which it never has" if odd and template else ""
    numbers = (int, float)
    if template is None or type(value) is type(template) or (type(value) in numbers and type(template) in numbers):
        return ""
    return f"{path} is {shorten(repr(value))}; it must be {_describe(type(template))}"
