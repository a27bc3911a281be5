"""What is compared: a file of variants, or a sweep, read and checked whole before anything is trained."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duoka.errors import ConfigError
from duoka.recipes.common import registry
from duoka.recipes.common.config import COMMAND_LINE, canonical, read_yaml, typed, typed_options

__all__ = ["OURS", "ExperimentSpec", "Variant", "read_plan"]

KEYS = ("recipe", "name", "base", "variants", "baseline", "seeds", "metric", "better")
OURS = ("out", "name", "resume", "seed")
"""Options of recipes that the comparison itself gives."""


@dataclass(frozen=True)
class Variant:
    """One training run of the comparison: a variant with a seed."""

    recipe: str
    variant: str
    seed: int
    options: dict[str, Any]
    """All that differs from the recipe's defaults, ``out``, ``name`` and ``resume`` left out."""
    folder: Path
    """Where its run lies."""

    @property
    def title(self) -> str:
        """What it is called where there are several seeds."""
        return f"{self.variant}, seed {self.seed}"

    def config(self, **changes: Any) -> Any:
        """Return the recipe's configuration."""
        kind = registry.find(self.recipe).Config
        options = {**self.options, "seed": self.seed, **changes}
        return typed(kind, options, f"the variant {self.variant!r}", recipe=self.recipe)


@dataclass(frozen=True)
class ExperimentSpec:
    """A whole comparison."""

    name: str
    folder: Path
    trials: tuple[Variant, ...]
    baseline: str
    """The variant that the others are compared with."""
    metric: str
    """A result of the evaluation, such as ``accuracy``."""
    higher: bool
    """Whether a higher value is better."""

    @property
    def variants(self) -> list[str]:
        """The names of the variants, in the file's order."""
        return list(dict.fromkeys(trial.variant for trial in self.trials))


def read_plan(
    source: str, *, out: str = "runs", sweep: Sequence[str] = (), changes: Mapping[str, Any] | None = None
) -> ExperimentSpec:
    """Read the comparison ``source``: a YAML file, or the name of a recipe where ``sweep`` says what varies.

    Args:
        source: the file has ``recipe``, ``variants`` (a name and the keys it changes each), and may have ``base`` (keys of
            all), ``baseline`` (a variant; else the first), ``seeds``, ``name``, ``metric`` and ``better``.
        out: the folder of all runs; this comparison becomes OUT/compare/NAME.
        sweep: ``key=value,value``; every variant is multiplied by every value.
        changes: keys that win over those of ``base``.

    Raises:
        ConfigError: anything in it that no recipe could be trained with, with the variant it stands in.

    """
    is_file = source.endswith((".yml", ".yaml"))
    if not is_file and not sweep:
        registry.find(source)
        raise ConfigError(
            f"`{source}` alone has nothing to compare: add --sweep lr=0.001,0.01, or give a file of variants"
        )
    document = read_yaml(source) if is_file else {"recipe": source, "name": f"{source}-sweep"}
    where = source if is_file else COMMAND_LINE
    if unknown := [key for key in document if key not in KEYS]:
        raise ConfigError(f"unknown key `{unknown[0]}` in {where}: there is {', '.join(KEYS)}")
    if not isinstance(document.get("recipe"), str):
        raise ConfigError(f"{where} does not say which recipe it compares: add the line `recipe: tiny-imagenet`")
    registry.find(document["recipe"])
    base = _base(document, where, changes or {})
    variants = _swept(_variants(document, where, bool(sweep)), sweep)
    baseline = str(document.get("baseline", next(iter(variants))))
    if baseline not in variants:
        raise ConfigError(f"`baseline` is {baseline!r} in {where}: it must be a variant: {', '.join(variants)}")
    name = str(document.get("name", Path(source).stem))
    folder = Path(out) / "compare" / _safe(name)
    trials = tuple(
        Variant(document["recipe"], variant, seed, {**base, **options}, folder / f"{_safe(variant)}-seed{seed}")
        for variant, options in variants.items()
        for seed in _seeds(document, where)
    )
    if len({trial.folder for trial in trials}) < len(trials):
        raise ConfigError(f"two variants in {where} have names that differ by punctuation only: rename one")
    for trial in trials:
        _check(trial)
    metric, better = document.get("metric", "accuracy"), document.get("better")
    if better not in (None, "higher", "lower"):
        raise ConfigError(f"`better` is {better!r} in {where}: it must be higher or lower")
    return ExperimentSpec(
        name, folder, trials, baseline, str(metric), "loss" not in str(metric) if better is None else better == "higher"
    )


def _base(document: Mapping[str, Any], where: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of all variants; those of the command line win."""
    kind, base = registry.find(document["recipe"]).Config, _mapping(document, "base", where)
    for options, place in ((base, f"`base` of {where}"), (changes, COMMAND_LINE)):
        _refuse_ours(options, place)
        typed_options(kind, options, place, recipe=document["recipe"])
    return {**canonical(base, where), **canonical(changes, COMMAND_LINE)}


def _refuse_ours(options: Mapping[str, Any], where: str) -> None:
    """Refuse what the comparison gives itself."""
    if taken := [key for key in options if key in OURS]:
        hint = "write `seeds: [0, 1]` beside `variants`" if taken[0] == "seed" else "leave it out"
        raise ConfigError(f"{where} has the key `{taken[0]}`, which the comparison gives itself: {hint}")


def _check(trial: Variant) -> None:
    """Refuse what the recipe cannot be trained with, with the variant it stands in."""
    _refuse_ours(trial.options, f"the variant {trial.variant!r}")
    try:
        trial.config().resolved()
    except ConfigError as error:
        named = f"the variant {trial.variant!r}"
        raise ConfigError(str(error) if named in str(error) else f"{named}: {error}") from error


def _mapping(document: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    value = document.get(key) or {}
    if not isinstance(value, dict):
        raise ConfigError(f"`{key}` in {where} holds a {type(value).__name__}: write one `key: value` a line below it")
    return value


def _variants(document: Mapping[str, Any], where: str, swept: bool) -> dict[str, dict[str, Any]]:
    variants = _mapping(document, "variants", where)
    if not variants:
        if swept:
            return {"": {}}
        raise ConfigError(f"{where} has no variants: write `variants:`, and a name and its keys a line below it")
    place = f"`variants` in {where}"
    return {str(name): canonical(_mapping(variants, name, place), place) for name in variants}


def _swept(variants: dict[str, dict[str, Any]], sweep: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Multiply ``variants`` by the values of each sweep."""
    columns = []
    for text in sweep:
        key, _, values = text.partition("=")
        listed = [value for value in values.split(",") if value]
        if not key or not listed:
            raise ConfigError(f"--sweep is {text!r}: write --sweep key=value,value, such as --sweep lr=0.001,0.01,0.1")
        columns.append([(key, value) for value in listed])
    if not columns:
        return variants
    return {
        " ".join(filter(None, [name, *(f"{key}={value}" for key, value in chosen)])): {
            **options,
            **canonical(dict(chosen), COMMAND_LINE),
        }
        for name, options in variants.items()
        for chosen in itertools.product(*columns)
    }


def _seeds(document: Mapping[str, Any], where: str) -> list[int]:
    seeds = document.get("seeds", [0])
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise ConfigError(f"`seeds` is {seeds!r} in {where}: it must be a list of whole numbers, such as [0, 1, 2]")
    return list(dict.fromkeys(seeds))


def _safe(name: str) -> str:
    """Return ``name`` as a file name."""
    return re.sub(r"[^\w.=+-]+", "-", name).strip("-.") or "variant"
