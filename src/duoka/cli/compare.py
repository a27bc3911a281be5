"""``duoka compare FILE.yml``: variants of a recipe trained and compared."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from duoka.cli.console import complain, console
from duoka.errors import ConfigError

__all__ = ["SUMMARY", "run"]

SUMMARY = "train variants of a recipe and compare them"


def run(argv: Sequence[str]) -> int:
    """Train what ``argv`` names and is not finished, print the table, and return the exit status: 1 if a variant failed."""
    options, rest = _parser().parse_known_args(argv)
    from duoka.recipes.experiments import read_experiment, result_rows, run_all, write_summary
    from duoka.recipes.experiments.results import HEADINGS, format_rows

    if options.source is None:
        raise ConfigError(
            "nothing is named to compare: `duoka compare FILE.yml`, or `duoka compare cifar100 --sweep lr=0.001,0.01`"
        )
    plan = read_experiment(options.source, out=options.out, sweep=options.sweep, changes=_changes(rest))
    out = console()
    failed = run_all(plan, parallel=options.parallel, report=lambda text: out.print(f"== {text}", soft_wrap=True))
    rows = result_rows(plan)
    if rows:
        from rich.table import Table

        table = Table(*HEADINGS, title=f"{plan.name}: {plan.metric}")
        for line in format_rows(plan, rows):
            table.add_row(*line)
        out.print(table)
        out.print(f"pictures: {write_summary(plan, rows)}", soft_wrap=True)
    for title, error in failed.items():
        complain(f"{title} failed: {error.rstrip('.')}; the same command tries it again")
    return 1 if failed else 0


def _changes(words: list[str]) -> dict[str, Any]:
    """Return the recipe's own options among the words."""
    changes: dict[str, Any] = {}
    while words:
        flag, joined, value = words.pop(0).partition("=")
        if not flag.startswith("--"):
            raise ConfigError(f"{flag!r} on the command line belongs to no option: write `--key {flag}`")
        if not joined:
            if not words or words[0].startswith("--"):
                raise ConfigError(f"`{flag}` on the command line lacks its value: write `{flag} VALUE`")
            value = words.pop(0)
        changes[flag.removeprefix("--").replace("-", "_")] = value
    return changes


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "duoka compare",
        usage="duoka compare FILE.yml|RECIPE [--sweep KEY=VALUE,VALUE] [--parallel] [--out DIR] [--KEY VALUE] ...",
        description=f"{SUMMARY[0].upper()}{SUMMARY[1:]}. The same command goes on where it was stopped.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "source", nargs="?", metavar="FILE.yml|RECIPE", help="a file of variants, or a recipe with --sweep"
    )
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        nargs="?",
        const="",
        metavar="KEY=VALUE,VALUE",
        help="values of a key to compare",
    )
    parser.add_argument("--parallel", action="store_true", help="train a variant on each device, instead of one on all")
    parser.add_argument("--out", default="runs", metavar="DIR", help="folder of all runs (default: %(default)s)")
    return parser
