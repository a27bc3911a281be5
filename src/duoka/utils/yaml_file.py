"""Reader of YAML files from anywhere: mappings, lists and text, without tags, and with limits on size and nesting.

A scalar stays the text that the file has, whatever it looks like; the option that it is for decides its type. Only a
plain ``null``, ``~`` or nothing is ``None``. So no date, number or class is made from what a file says it is.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from duoka.errors import ConfigError
from duoka.utils.files import read_file
from duoka.utils.text import shorten

MAX_BYTES = 100_000
MAX_VALUES = 5000
"""Values of a file, those of an alias counted at each of its places."""
MAX_DEPTH = 20
_NULLS = ("", "~", "null", "Null", "NULL")
_MERGE = "<<"


class _Node(NamedTuple):
    """A value and the number of values in it."""

    value: Any
    size: int


def read_yaml(path: str | Path, same_keys: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return the mapping that a YAML file holds.

    Args:
        path: a file of at most ``MAX_BYTES``.
        same_keys: further names of keys, which may not stand beside the key itself.

    Raises:
        ConfigError: the file is missing, is not YAML (with the line), is too large or too deep, has a tag, sets a key
            twice, or holds something other than ``key: value`` lines.
    """
    try:
        text = read_file(path, MAX_BYTES).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(
            f"cannot read the configuration file {path}: {reason}; give a file of `key: value` lines, as --print_config prints"
        ) from error
    options = parse_yaml(text, str(path), same_keys)
    if options is None:
        return {}
    if not isinstance(options, dict):
        raise ConfigError(
            f"{path} holds a {type(options).__name__}: write one `key: value` a line, such as `epochs: 50`"
        )
    return options


def parse_yaml(text: str, where: str, same_keys: Mapping[str, str] | None = None) -> Any:
    """Return the one document in ``text``; ``where`` names it in messages. Raises as ``read_yaml`` does."""
    reader = _Reader(yaml.parse(text, Loader=yaml.SafeLoader), where, same_keys or {})
    try:
        return reader.document()
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = problem or getattr(error, "reason", "") or type(error).__name__
        raise ConfigError(f"{where}{line}: not valid YAML: {reason}: write one `key: value` a line") from error


class _Reader:
    """Builds values from the parser's events, which come one by one, so that a limit ends the reading."""

    def __init__(self, events: Iterable[Any], where: str, same_keys: Mapping[str, str]) -> None:
        self._events: Iterator[Any] = iter(events)
        self._where, self._same_keys = where, same_keys
        self._anchors: dict[str | None, _Node] = {}
        self._num_values = 0

    def document(self) -> Any:
        """Return the value of the only document; ``None`` for an empty file."""
        value, number = None, 0
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                number += 1
                if number > 1:
                    raise self._error(event, "a second document begins: keep one, without lines of `---`")
                value = self._node(next(self._events), 0).value
        return value

    def _node(self, event: Any, depth: int) -> _Node:
        if depth > MAX_DEPTH:
            raise self._error(event, f"the values are nested deeper than {MAX_DEPTH} levels: flatten them")
        if isinstance(event, yaml.AliasEvent):
            node = self._anchors.get(event.anchor)
            if node is None:
                raise self._error(event, f"the alias *{event.anchor} has no complete value before it: write the value")
            self._count(event, node.size)
            return node
        if event.tag is not None:
            raise self._error(event, f"the tag {shorten(event.tag)!r} is not supported: remove it")
        self._count(event, 1)
        before = self._num_values
        if isinstance(event, yaml.ScalarEvent):
            value: Any = None if event.style is None and event.value in _NULLS else event.value
        elif isinstance(event, yaml.SequenceStartEvent):
            value = [self._node(item, depth + 1).value for item in self._until(yaml.SequenceEndEvent)]
        else:
            value = self._mapping(depth + 1)
        node = _Node(value, 1 + self._num_values - before)
        if event.anchor is not None:
            self._anchors[event.anchor] = node
        return node

    def _until(self, end: type[Any]) -> Iterator[Any]:
        for event in self._events:
            if isinstance(event, end):
                return
            yield event

    def _mapping(self, depth: int) -> dict[str, Any]:
        """Return a mapping; the entries of ``<<`` stand behind its own."""
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for event in self._until(yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent) or event.tag is not None:
                raise self._error(event, "a key must be plain text: write `key: value`")
            key, line = event.value, _line(event)
            name = self._same_keys.get(key, key)
            if name in lines:
                raise ConfigError(
                    f"{self._where}: `{shorten(name)}` is set in line {lines[name]} and in line {line}; remove one of them"
                )
            lines[name] = line
            self._count(event, 1)
            value = self._node(next(self._events), depth).value
            if key == _MERGE and event.style is None:
                for part in value if isinstance(value, list) else [value]:
                    if not isinstance(part, dict):
                        raise self._error(event, f"{_MERGE} takes the keys of a mapping: name one by its alias")
                    merged = {**part, **merged}
            else:
                own[key] = value
        return {**merged, **own}

    def _count(self, event: Any, number: int) -> None:
        self._num_values += number
        if self._num_values > MAX_VALUES:
            raise self._error(event, f"the file has more than {MAX_VALUES:,} values, aliases included: shorten it")

    def _error(self, event: Any, reason: str) -> ConfigError:
        return ConfigError(f"{self._where}, line {_line(event)}: {reason}")


def _line(event: Any) -> int:
    return int(event.start_mark.line) + 1
