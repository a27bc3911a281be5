"""Options from a dataclass, a YAML file and the command line into one checked configuration."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import math
import textwrap
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml

from duoka.errors import ConfigError
from duoka.recipes.common.recipe_run import RecipeRun

__all__ = [
    "COMMAND_LINE",
    "at_least",
    "canonical",
    "check",
    "field_docs",
    "of_run",
    "read",
    "read_yaml",
    "refuse_changes",
    "typed",
    "typed_options",
]

C = TypeVar("C")
COMMAND_LINE = "the command line"
ALIASES = {"bsize": "batch_size", "workers": "num_workers", "devices": "device"}
"""Second names of options, in files and on the command line."""
OTHER_NAMES = {
    "lr": ("learning_rate", "learningrate", "rate", "base_lr", "init_lr"),
    "batch_size": ("batchsize", "bs", "train_batch_size", "per_device_train_batch_size"),
    "batch_size_means": ("batch",),
    "num_workers": ("n_workers", "dataloader_num_workers"),
    "eval_every_epochs": ("eval_step", "eval_every"),
    "epochs": ("num_epochs", "n_epochs", "max_epochs", "num_train_epochs"),
    "optimizer": ("optim", "opt", "optimiser"),
    "scheduler": ("lr_scheduler", "schedule", "sched"),
    "weight_decay": ("wd", "l2", "decay"),
    "model": ("arch", "net", "network", "backbone"),
    "device": ("gpu", "gpus", "gpu_ids", "device_ids"),
    "root": ("data", "data_dir", "data_root", "data_path", "dir"),
    "out": ("output", "output_dir", "out_dir", "save_dir", "log_dir"),
    "precision": ("amp", "dtype", "fp16", "bf16", "mixed_precision"),
    "warmup_epochs": ("warmup",),
    "label_smoothing": ("smoothing",),
    "seed": ("random_seed", "manual_seed"),
    "resume": ("checkpoint", "ckpt", "resume_from"),
    "csv": ("file", "data", "data_path", "from"),
}
"""What other programs call an option: the option's own name comes first, and these lead to it."""


def read(kind: type[C], arguments: Sequence[str], *, recipe: str) -> C:
    """Build the dataclass ``kind`` from ``[-c FILE.yml] [--resume RUN] [--key value] ...``.

    The command line wins over the file, and the file over the defaults. ``--resume RUN`` takes RUN's own file.

    Raises:
        ConfigError: an unknown key, a wrong type or value, a missing or unreadable file; what, where, and the remedy.
        SystemExit: ``--help`` was asked for, and printed.

    """
    parser = _parser(cast("Any", kind), recipe)
    given = _command_line(parser, kind, arguments)
    path = given.pop("config", None)
    stopped = RecipeRun.at(given["resume"]) if given.get("resume") else None
    if path is None and stopped:
        path = str(stopped.config)
    options: dict[str, Any] = {}
    if path is not None:
        options = _typed(kind, parser, read_yaml(path), path, recipe)
    typed = _typed(kind, parser, given, COMMAND_LINE, recipe)
    config = kind(**{**options, **typed})
    if stopped and (typed.keys() - {"resume"} or path != str(stopped.config)):
        own = _typed(kind, parser, read_yaml(stopped.config), stopped.config, recipe)
        refuse_changes(stopped, recipe, kind(**own), config)
    return config


def refuse_changes(run: RecipeRun, recipe: str, before: Any, now: Any) -> None:
    """Refuse to go on with ``run`` under options that its checkpoint does not fit, before anything is started.

    The recipe's options name them: ``FIXED`` are those that make the model and its optimiser, ``PLANNED`` the schedules that
    are planned for a number of steps, which must not grow.

    Raises:
        ConfigError: an option is another one; which, what it was, and the remedy.

    """
    before, now = before.resolved(), now.resolved()
    fresh = f"or begin a new run with it: duoka train {recipe} -c {run.config}"
    for key in now.FIXED:
        was, wanted = getattr(before, key), getattr(now, key)
        if was != wanted:
            raise ConfigError(
                f"`{key}` was {_shown(was)} in this run and is {_shown(wanted)} now, which its checkpoint does not fit: "
                f"leave --{key} out to go on, {fresh} --{key} {_shown(wanted)}"
            )
    if now.scheduler not in now.PLANNED:
        return
    alike = (before.device, before.batch_size_means) == (now.device, now.batch_size_means)
    shrinks = alike and now.batch_size < before.batch_size
    for key, grows in (("epochs", now.epochs > before.epochs), ("batch_size", shrinks)):
        if grows and before.epochs * now.batch_size < now.epochs * before.batch_size:
            was, wanted = getattr(before, key), getattr(now, key)
            raise ConfigError(
                f"`{key}` was {was} in this run and is {wanted} now: its schedule `{now.scheduler}` was planned for fewer "
                f"steps and would go on past its end: leave --{key} out to go on, {fresh} --{key} {wanted}"
            )


def _shown(value: Any) -> str:
    """Return a value as one writes it on the command line."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def typed(kind: type[C], options: Mapping[str, Any], where: str, *, recipe: str) -> C:
    """Build the dataclass ``kind`` from ``options``, which stand in ``where``; raises ``ConfigError``."""
    return kind(**typed_options(kind, options, where, recipe=recipe))


def typed_options(kind: type[Any], options: Mapping[str, Any], where: str, *, recipe: str) -> dict[str, Any]:
    """Return ``options``, which stand in ``where``, with each value as its field's type; raises ``ConfigError``."""
    return _typed(kind, _parser(cast("Any", kind), recipe), options, where, recipe)


def of_run(kind: type[C], run: RecipeRun) -> C:
    """Return the options that ``run`` was trained with."""
    return read(kind, ["-c", str(run.config)], recipe=run.recipe())


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds.

    Raises:
        ConfigError: the file is missing, is no YAML (with the line), or holds something else than ``key: value`` lines.

    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"cannot read the configuration file {path}: {reason}") from error
    try:
        _refuse_repeated_keys(yaml.compose(text, Loader=yaml.SafeLoader), path)
        options = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {error.problem}: write one `key: value` a line") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if options is None:
        return {}
    if not isinstance(options, dict):
        raise ConfigError(
            f"{path} holds a {type(options).__name__}: write one `key: value` a line, such as `epochs: 50`"
        )
    return options


def _refuse_repeated_keys(root: yaml.Node | None, path: str | Path) -> None:
    """YAML's reader would take the last of several values without a word, here or in a mapping within."""
    lines: dict[str, int] = {}
    for key, value in root.value if isinstance(root, yaml.MappingNode) else ():
        _refuse_repeated_keys(value, path)
        line = key.start_mark.line + 1
        if str(key.value) in lines:
            raise ConfigError(
                f"{path}: `{key.value}` stands in line {lines[str(key.value)]} and in line {line}; remove one of them"
            )
        lines[str(key.value)] = line


def check(config: Any) -> None:
    """Make sure that every field of a dataclass has a value of its type; for ``__post_init__``.

    Raises:
        ConfigError: one has not.

    """
    for key, hint in typing.get_type_hints(type(config)).items():
        if not _fits(getattr(config, key), hint):
            raise ConfigError(_wrong(key, getattr(config, key), hint, type(config).__name__))


def at_least(config: Any, key: str, least: float, *, exclusive: bool = False, below: float = math.inf) -> None:
    """Make sure that a number is ``least`` or more (``exclusive``: more), and finite, and under ``below``.

    Raises:
        ConfigError: it is not; ``None`` is not judged.

    """
    value = getattr(config, key)
    if value is None or (least < value < below if exclusive else least <= value < below):
        return
    limits = f"above {least:g}" if exclusive else f"{least:g} or more"
    limits += "" if below == math.inf else f", and below {below:g}"
    raise ConfigError(f"`{key}` is {value!r}: it must be a finite number, {limits}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether ``value`` is of the type ``hint``; a whole number is a number too, and true and false are none."""
    if typing.get_origin(hint) is typing.Literal:
        return value in typing.get_args(hint)
    if parts := typing.get_args(hint):
        return any(_fits(value, part) for part in parts)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is hint


def field_docs(kind: type[Any]) -> dict[str, str]:
    """Return the docstring below each field of a dataclass."""
    (body,) = (
        node.body for node in ast.parse(textwrap.dedent(inspect.getsource(kind))).body if isinstance(node, ast.ClassDef)
    )
    docs = {}
    for field, doc in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(doc, ast.Expr):
            docs[field.target.id] = " ".join(str(ast.literal_eval(doc.value)).split())
    return docs


@functools.cache
def _parser(kind: Any, recipe: str) -> Any:
    """Return the parser of all options, which also writes the help."""
    from jsonargparse import ArgumentParser

    usage = f"duoka train {recipe} [-c FILE.yml] [--KEY VALUE] ..."
    parser = ArgumentParser(
        prog=f"duoka train {recipe}", usage=usage, exit_on_error=False, description=inspect.getdoc(kind)
    )
    parser.add_argument("-c", "--config", type=str, default=None, help="a YAML file of the options below, `key: value`")
    hints, docs = typing.get_type_hints(kind), field_docs(kind)
    for field in dataclasses.fields(kind):
        help_text = docs[field.name].replace("``", "").replace("%", "%%")
        parser.add_argument(f"--{field.name}", type=hints[field.name], default=field.default, help=help_text)
    return parser


def _command_line(parser: Any, kind: type[Any], arguments: Sequence[str]) -> dict[str, Any]:
    """Return the options that were given, as text, and nothing of the defaults."""
    if "-h" in arguments or "--help" in arguments:
        parser.parse_args(["--help"])
    names = [field.name for field in dataclasses.fields(kind)]
    hints = typing.get_type_hints(kind)
    given: dict[str, Any] = {}
    left = list(arguments)
    while left:
        flag, joined, value = left.pop(0).partition("=")
        name = "config" if flag == "-c" else flag.removeprefix("--").replace("-", "_")
        name = ALIASES.get(name, name)
        if not flag.startswith("-"):
            raise ConfigError(f"{flag!r} on the command line belongs to no option: write `--key {flag}`")
        if name not in ("config", *names):
            raise ConfigError(_unknown(name, names, COMMAND_LINE))
        if not joined:
            alone = not left or left[0].startswith("--")
            if alone and hints.get(name) is bool:
                given[name] = "true"
                continue
            if alone:
                raise ConfigError(f"`{flag}` on the command line lacks its value: write `{flag} VALUE`")
            value = left.pop(0)
        given[name] = value
    return given


def _typed(kind: type[Any], parser: Any, options: Mapping[str, Any], where: str | Path, recipe: str) -> dict[str, Any]:
    """Return ``options`` with each value as its field's type."""
    from jsonargparse import ArgumentError

    hints = typing.get_type_hints(kind)
    typed = {}
    for key, value in canonical(options, where).items():
        if key == "recipe":
            if value != recipe:
                raise ConfigError(f"{where} is for the recipe `{value}`: use `duoka train {value} -c {where}`")
            continue
        if key not in hints:
            raise ConfigError(_unknown(str(key), list(hints), where))
        candidate = str(value) if _is_text(hints[key]) and isinstance(value, (int, float)) else value
        try:
            typed[key] = parser.parse_object({key: candidate}, defaults=False)[key]
        except ArgumentError as error:
            raise ConfigError(_wrong(key, value, hints[key], where)) from error
    return typed


def canonical(options: Mapping[str, Any], where: str | Path) -> dict[str, Any]:
    """Return ``options`` with every alias replaced by the option's name; raises ``ConfigError`` where both stand."""
    named: dict[str, Any] = {}
    for key, value in options.items():
        name = ALIASES.get(key, key)
        if name in named:
            raise ConfigError(f"`{key}` {_in(where)} is another name of `{name}`, which stands there too: remove one")
        named[name] = value
    return named


def _is_text(hint: Any) -> bool:
    """Whether a field is for text, so that ``device: 0`` means ``"0"``."""
    return hint is str or str in typing.get_args(hint)


def _unknown(key: str, names: Sequence[str], where: str | Path) -> str:
    meant = [name for name, others in OTHER_NAMES.items() if key.lower() in others and name in names]
    close = meant or [ALIASES.get(name, name) for name in difflib.get_close_matches(key, [*names, *ALIASES], n=1)]
    hint = f"did you mean `{close[0]}`?" if close else f"there is {', '.join(names)}"
    return f"unknown key `{key}` {_in(where)}: {hint}"


def _wrong(key: str, value: Any, hint: Any, where: str | Path) -> str:
    close = difflib.get_close_matches(str(value).lower(), list(map(str, typing.get_args(hint))), n=1)
    meant = f"; did you mean `{close[0]}`?" if close else ""
    return f"`{key}` is {value!r} {_in(where)}: it must be {_in_words(hint)}{meant}"


def _in(where: str | Path) -> str:
    return f"on {where}" if where is COMMAND_LINE else f"in {where}"


def _in_words(hint: Any) -> str:
    """Say a type as people do."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    if hint in words:
        return words[hint]
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {', '.join(map(str, typing.get_args(hint)))}"
    return " or ".join(_in_words(part) for part in typing.get_args(hint)) or str(hint)
