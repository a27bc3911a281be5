"""jsonargparse's parser with plain help, and with its errors as duoka's one-line messages.

The parser hands every value over as text, and ``parse_value`` reads it: jsonargparse would load it as YAML.
"""

import argparse
import ast
import dataclasses
import inspect
import itertools
import re
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse

from duoka.errors import ConfigError
from duoka.utils.text import did_you_mean, first_line
from duoka.utils.validation import describe_type, fits, invalid_option, parse_value

_METAVARS = {int: "N", float: "X", str: "TEXT", bool: "true|false"}


class ArgumentParser(jsonargparse.ArgumentParser):
    """Parser of a command line or of a configuration file; its errors are ``ConfigError``.

    Args:
        prog: the command, such as ``duoka train cifar100``.
        description: one or more paragraphs for the help.
        other_names: names of options in other programs, which messages lead to ours.
        options: further arguments of ``argparse.ArgumentParser``.
    """

    def __init__(
        self,
        prog: str,
        description: str = "",
        *,
        other_names: Mapping[str, Sequence[str]] | None = None,
        **options: Any,
    ) -> None:
        self._other_names = other_names or {}
        self._hints: dict[str, Any] = {}
        self._keys: list[str] = []
        self._file = ""
        super().__init__(
            prog=prog,
            description=description,
            formatter_class=argparse.HelpFormatter,
            exit_on_error=False,
            print_config=None,
            allow_abbrev=False,
            **options,
        )

    def add_fields(
        self, kind: Any, title: str, fields: Sequence[str], aliases: Mapping[str, str] | None = None
    ) -> None:
        """Add a group of options, one for each of the ``fields`` of the dataclass ``kind``, with its docstring as help."""
        group = self.add_argument_group(title)
        hints, docs = typing.get_type_hints(kind), field_docs(kind)
        for field in (field for field in dataclasses.fields(kind) if field.name in fields):
            hint = hints[field.name]
            names = [field.name, *(alias for alias, name in (aliases or {}).items() if name == field.name)]
            self._keys += names
            switch: dict[str, Any] = {"nargs": "?", "const": True} if hint is bool else {}
            group.add_argument(
                *(f"--{name}" for name in names),
                type=hint,
                default=field.default,
                metavar=_metavar(hint),
                help=help_text(docs[field.name], field.default),
                **switch,
            )

    def add_argument(self, *names: str, **options: Any) -> Any:
        """Add an argument, as argparse does; jsonargparse gives this method to groups of arguments too."""
        hint = options.pop("type", str)
        action = super().add_argument(*names, **options)
        getattr(self, "parser", self)._hints[action.dest] = hint
        return action

    def parse(self, words: Sequence[str], *, defaults: bool = True) -> jsonargparse.Namespace:
        """Return the options of a command line; without ``defaults`` only those that it names."""
        self._file = ""
        found = self.parse_args([self._with_underscores(word) for word in words], defaults=defaults)
        for key, value in vars(found).items():
            hint = self._hints.get(key, str)
            if isinstance(value, str) and hint is not str:
                is_null = value == "null" and type(None) in typing.get_args(hint)
                found[key] = None if is_null else self._read(key, value)
        return found

    def offer_choices(self) -> None:
        """Let a completion script offer the values of options that have a few, here and in the subcommands."""
        for action in self._actions:
            parsers = action.choices if isinstance(action, argparse._SubParsersAction) else {}
            for parser in parsers.values():
                parser.offer_choices()
            hint = _without_none(self._hints.get(action.dest, str))
            if typing.get_origin(hint) is typing.Literal:
                action.choices = [str(choice) for choice in typing.get_args(hint)]

    def parse_file(self, options: Mapping[str, Any], source: str | Path) -> dict[str, Any]:
        """Return the ``options`` that were read from the file ``source``, each with the type of its field."""
        self._file = str(source)
        for key in options:
            if key not in self._keys:
                raise self._unknown(str(key))
        own_names = {key: self._option_string_actions[f"--{key}"].dest for key in options}
        return {own_names[key]: self._read(own_names[key], value) for key, value in options.items()}

    def _read(self, key: str, value: Any) -> Any:
        """Return an option's value from its text; a value that has its type already stays as it is."""
        hint = self._hints.get(key, str)
        if not isinstance(value, str):
            if fits(value, hint):
                return value
            raise self._invalid(key, format_value(value) if value is None else value)
        try:
            return parse_value(value, hint)
        except (ValueError, KeyError):
            raise self._invalid(key, value) from None

    def _with_underscores(self, word: str) -> str:
        """Return ``--weight-decay=1`` as ``--weight_decay=1``, if only the second is an option."""
        flag, joined, value = word.partition("=")
        known = self._option_string_actions
        other = f"--{flag[2:].replace('-', '_')}"
        return other + joined + value if flag not in known and other in known else word

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise ``ConfigError`` for a message of argparse or jsonargparse."""
        if match := re.match(r"unrecognized arguments: (\S+)", message):
            word = match[1].partition("=")[0]
            if not word.startswith("-"):
                raise ConfigError(
                    f"{word!r} belongs to no option: write `--KEY {word}`; see `{self.prog} --help`"
                ) from ex
            raise self._unknown(word.lstrip("-")) from ex
        if match := re.match(r"argument (\S+): expected (?:one|at least one) argument", message):
            flag = match[1].partition("/")[0]
            value = self._option_string_actions[flag].metavar or "VALUE"
            raise ConfigError(f"{flag} needs a value: write `{flag} {value}`; see `{self.prog} --help`") from ex
        raise ConfigError(f"{first_line(message).rstrip('.')}; see `{self.prog} --help`") from ex

    def _invalid(self, key: str, value: object) -> ConfigError:
        hint = _without_none(self._hints.get(key, str))
        where, dashes = (f"{self._file}: ", "") if self._file else ("", "--" if self._flags_of(key) else "")
        return invalid_option(
            f"{where}{dashes}{key}", value, describe_type(hint), did_you_mean(value, typing.get_args(hint))
        )

    def _unknown(self, key: str) -> ConfigError:
        """Return the error for an option that does not exist; names of other programs lead to ours."""
        key, hidden = key.replace("-", "_"), ("help", "print_shtab")
        flags = [name[2:] for name in self._option_string_actions if name.startswith("--") and name[2:] not in hidden]
        known = self._keys if self._file else flags
        meant = [name for name, others in self._other_names.items() if key.lower() in others and name in known]
        prefix = "" if self._file else "--"
        names = [f"{prefix}{name}" for name in known]
        hint = did_you_mean(f"{prefix}{meant[0] if meant else key}", names) or f"there is {', '.join(names)}"
        kind = f"{self._file}: unknown key" if self._file else "unknown option"
        return ConfigError(f"{kind} {prefix}{key}; {hint}")

    def _flags_of(self, key: str) -> list[str]:
        """Return the flags of an option; a positional argument has none."""
        return [flag for flag, action in self._option_string_actions.items() if action.dest == key]


def field_docs(kind: type[Any]) -> dict[str, str]:
    """Return the docstring below each field of a dataclass; one that begins with "Default:" extends its base class's."""
    docs: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        (body,) = (
            node.body
            for node in ast.parse(textwrap.dedent(inspect.getsource(base))).body
            if isinstance(node, ast.ClassDef)
        )
        for field, doc in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(doc, ast.Expr):
                name, text = field.target.id, " ".join(str(ast.literal_eval(doc.value)).split())
                docs[name] = f"{docs[name]} {text}" if text.startswith("Default:") else text
    return docs


def help_text(doc: str, default: object) -> str:
    """Return the help of an option: its docstring and its default."""
    text = doc.replace("``", "").replace("%", "%%")
    return text if default is None else f"{text} Default: {format_value(default)}."


def _metavar(hint: Any) -> str:
    kind = _without_none(hint)
    if typing.get_origin(kind) is typing.Literal:
        return "{" + ",".join(map(str, typing.get_args(kind))) + "}"
    return _METAVARS.get(kind, "VALUE")


def _without_none(hint: Any) -> Any:
    """Return ``T`` for ``T | None``."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = typing.Union[tuple(part for part in typing.get_args(hint) if part is not type(None))]  # noqa: UP007
    return hint


def format_value(value: object) -> str:
    """Return a value as it is written on the command line."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
