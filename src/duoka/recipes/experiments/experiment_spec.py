"""Specification of an experiment: a file of variants, or a sweep, read and checked before any training."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duoka.errors import ConfigError
from duoka.recipes.common import registry
from duoka.recipes.common.config import ALIASES, parse_options
from duoka.utils.files import safe_name
from duoka.utils.text import shorten
from duoka.utils.validation import parse_value
from duoka.utils.yaml_file import read_yaml

COMMAND_LINE = "the command line"
KEYS = ("recipe", "name", "base", "variants", "baseline", "seeds", "metric", "better")
RESERVED_KEYS = ("out", "name", "resume", "seed")
"""Options of recipes that the experiment sets."""
MAX_TRIALS = 1000


@dataclass(frozen=True)
class Trial:
    """One training run: a variant with a seed."""

    recipe: str
    variant: str
    seed: int
    options: dict[str, Any]
    """Options that differ from the recipe's defaults, without the reserved keys."""
    folder: Path
    """Folder of its run."""

    @property
    def title(self) -> str:
        """The name of the variant with the seed."""
        return f"{self.variant}, seed {self.seed}"

    def config(self, **changes: Any) -> Any:
        """Return the recipe's configuration."""
        kind = registry.find_recipe(self.recipe).Config
        options = {**self.options, "seed": self.seed, **changes}
        return kind(**parse_options(kind, options, f"the variant {self.variant!r}", recipe=self.recipe))


@dataclass(frozen=True)
class ExperimentSpec:
    """All trials of an experiment, and how to compare them."""

    name: str
    folder: Path
    trials: tuple[Trial, ...]
    baseline: str
    """The variant with which the others are compared."""
    metric: str
    """A metric of the evaluation, such as ``accuracy``."""
    higher: bool
    """Whether a higher value is better."""

    @property
    def variants(self) -> list[str]:
        """The names of the variants, in the file's order."""
        return list(dict.fromkeys(trial.variant for trial in self.trials))


def read_experiment(
    source: str, *, out: str = "runs", sweep: Sequence[str] = (), changes: Mapping[str, Any] | None = None
) -> ExperimentSpec:
    """Read the experiment ``source``: a YAML file, or the name of a recipe whose options ``sweep`` varies.

    Args:
        source: the file has ``recipe`` and ``variants`` (for each name the keys it changes), and may have ``base`` (keys of
            all variants), ``baseline`` (default: the first variant), ``seeds``, ``name``, ``metric`` and ``better``.
        out: the folder of all runs; this experiment gets OUT/compare/NAME.
        sweep: ``key=value,value``; every variant is combined with every value.
        changes: keys that override those of ``base``.

    Raises ConfigError for an option that is not valid, with the variant that has it.
    """
    is_file = source.endswith((".yml", ".yaml"))
    if not is_file and not sweep:
        registry.find_recipe(source)
        raise ConfigError(
            f"`{source}` alone has nothing to compare: add --sweep lr=0.001,0.01, or give a file of variants"
        )
    document = read_yaml(source, ALIASES) if is_file else {"recipe": source, "name": f"{source}-sweep"}
    where = source if is_file else COMMAND_LINE
    if unknown := [key for key in document if key not in KEYS]:
        raise ConfigError(f"unknown key `{unknown[0]}` in {where}: there is {', '.join(KEYS)}")
    if not isinstance(document.get("recipe"), str):
        raise ConfigError(f"{where} does not say which recipe it compares: add the line `recipe: tiny-imagenet`")
    recipe = document["recipe"]
    kind = registry.find_recipe(recipe).Config
    base: dict[str, Any] = {}
    for options, place in ((_mapping(document, "base", where), f"`base` of {where}"), (changes or {}, COMMAND_LINE)):
        _reject_reserved(options, place)
        base |= parse_options(kind, options, place, recipe=recipe)
    variants = _apply_sweeps(_variants(document, where, bool(sweep)), sweep)
    baseline = _text(document, "baseline", next(iter(variants)), where)
    if baseline not in variants:
        raise ConfigError(f"`baseline` is {baseline!r} in {where}: it must be a variant: {', '.join(variants)}")
    name = _text(document, "name", Path(source).stem, where)
    folder = Path(out) / "compare" / safe_name(name)
    parsed = {name: parse_options(kind, own, f"the variant {name!r}", recipe=recipe) for name, own in variants.items()}
    seeds = _seeds(document, where)
    _check_number(len(parsed) * len(seeds), where)
    trials = tuple(
        Trial(recipe, variant, seed, {**base, **options}, folder / f"{safe_name(variant)}-seed{seed}")
        for variant, options in parsed.items()
        for seed in seeds
    )
    if len({trial.folder for trial in trials}) < len(trials):
        raise ConfigError(f"two variants in {where} have names that differ by punctuation only: rename one")
    for trial in trials:
        _check_trial(trial)
    metric, better = _text(document, "metric", "accuracy", where), document.get("better")
    if better not in (None, "higher", "lower"):
        raise ConfigError(f"`better` is {better!r} in {where}: it must be higher or lower")
    higher = "loss" not in metric if better is None else better == "higher"
    return ExperimentSpec(name, folder, trials, baseline, metric, higher)


def _check_number(trials: int, where: str) -> None:
    if trials > MAX_TRIALS:
        raise ConfigError(
            f"{where} asks for {trials:,} runs: {MAX_TRIALS:,} can be compared; leave out variants or seeds"
        )


def _reject_reserved(options: Mapping[str, Any], where: str) -> None:
    if taken := [key for key in options if key in RESERVED_KEYS]:
        hint = "write `seeds: [0, 1]` beside `variants`" if taken[0] == "seed" else "leave it out"
        raise ConfigError(f"{where} has the key `{taken[0]}`, which `duoka compare` sets: {hint}")


def _check_trial(trial: Trial) -> None:
    """Raise for options that the recipe cannot use, with the variant's name."""
    _reject_reserved(trial.options, f"the variant {trial.variant!r}")
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
    return {name: _mapping(variants, name, f"`variants` in {where}") for name in variants}


def _apply_sweeps(variants: dict[str, dict[str, Any]], sweep: Sequence[str]) -> dict[str, dict[str, Any]]:
    columns = []
    for text in sweep:
        key, _, values = text.partition("=")
        listed = [value for value in values.split(",") if value]
        if not key or not listed:
            raise ConfigError(f"--sweep is {text!r}: write --sweep key=value,value, such as --sweep lr=0.001,0.01,0.1")
        columns.append([(key, value) for value in listed])
    _check_number(len(variants) * math.prod(map(len, columns)), COMMAND_LINE)
    if not columns:
        return variants
    return {
        " ".join(filter(None, [name, *(f"{key}={value}" for key, value in chosen)])): {**options, **dict(chosen)}
        for name, options in variants.items()
        for chosen in itertools.product(*columns)
    }


def _seeds(document: Mapping[str, Any], where: str) -> list[int]:
    given = document.get("seeds", ["0"])
    try:
        seeds = [parse_value(seed, int) for seed in given] if isinstance(given, list) else []
    except (TypeError, ValueError):  # an item that is no text, or no whole number
        seeds = []
    if not seeds or min(seeds) < 0:
        shown = shorten(str(given))
        raise ConfigError(f"`seeds` is {shown} in {where}: it must be a list of whole numbers, such as [0, 1, 2]")
    return list(dict.fromkeys(seeds))


def _text(document: Mapping[str, Any], key: str, default: str, where: str) -> str:
    """Return the text of a key of the file."""
    value = document.get(key, default)
    if not isinstance(value, str):
        raise ConfigError(f"`{key}` is {shorten(str(value))} in {where}: write a text, such as `{key}: {default}`")
    return value
