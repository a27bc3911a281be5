"""``duoka data make NAME``: example data whose best possible result is known."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from duoka.cli.console import console

__all__ = ["SUMMARY", "run"]

SUMMARY = "make example data"
MOST_ROWS = 10_000_000


def run(argv: Sequence[str]) -> int:
    """Write the data that ``argv`` names and say what can be reached on them; return the exit status."""
    options = _parser().parse_args(argv)
    from duoka.errors import ConfigError
    from duoka.recipes.sets import datatry

    if not 2 <= options.rows <= MOST_ROWS or not 0 <= options.seed < 2**63:
        raise ConfigError(
            f"--rows is {options.rows} and --seed {options.seed}: rows must be 2 to {MOST_ROWS:,}, and the seed 0 to 2**63 - 1"
        )
    example = datatry.make(options.rows, options.seed)
    path = Path(options.to)
    datatry.write(path, example)
    out = console()
    out.print(f"wrote {path}: {options.rows:,} rows, 10 features, then {' and '.join(datatry.TARGETS)}", soft_wrap=True)
    for name, value in example.best_r2().items():
        out.print(f"best reachable R² of {name}: {value:.4f} (noise of deviation {datatry.NOISE[name]:g})")
    out.print(f"next: duoka train informer --task regress --csv {shlex.quote(str(path))}", soft_wrap=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("duoka data", description=f"{SUMMARY[0].upper()}{SUMMARY[1:]}.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    make = commands.add_parser("make", help="write a file of example data", description="Write a file of example data.")
    make.add_argument(
        "name", choices=["datatry"], help="datatry: a table of 10 features and 2 targets that follow a known law"
    )
    make.add_argument("--to", default="datatry.csv", metavar="FILE", help="the file to write (default: %(default)s)")
    make.add_argument("--rows", type=int, default=10_000, metavar="N", help="how many rows (default: %(default)s)")
    make.add_argument(
        "--seed", type=int, default=0, metavar="N", help="other rows by the same law (default: %(default)s)"
    )
    return parser
