"""``duoka data make NAME``: example data whose best possible result is known."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from duoka.cli.console import console

__all__ = ["SUMMARY", "run"]

SUMMARY = "make example data"
OWN = {"datatry": ("rows",), "movielens": ("users", "films", "ratings")}
"""Which sizes each example has."""
MOST_ROWS = 10_000_000


def run(argv: Sequence[str]) -> int:
    """Write the data that ``argv`` names and say what can be reached on them; return the exit status."""
    options = _parser().parse_args(argv)
    from duoka.errors import ConfigError

    foreign = [
        key for name, keys in OWN.items() for key in keys if name != options.name and getattr(options, key) is not None
    ]
    if foreign:
        sizes = ", ".join(f"--{key}" for key in OWN[options.name])
        raise ConfigError(f"--{foreign[0]} is no size of {options.name}, which has {sizes}")
    return _movielens(options) if options.name == "movielens" else _datatry(options)


def _datatry(options: argparse.Namespace) -> int:
    from duoka.errors import ConfigError
    from duoka.recipes.datasets import synthetic_table

    rows = 10_000 if options.rows is None else options.rows
    if not 2 <= rows <= MOST_ROWS or not 0 <= options.seed < 2**63:
        raise ConfigError(
            f"--rows is {rows} and --seed {options.seed}: rows must be 2 to {MOST_ROWS:,}, and the seed 0 to 2**63 - 1"
        )
    path = Path(options.to or "datatry.csv")
    _refuse_to_lose([path], options)
    example = synthetic_table.make(rows, options.seed)
    synthetic_table.write(path, example)
    out = console()
    out.print(f"wrote {path}: {rows:,} rows, 10 features, then {' and '.join(synthetic_table.TARGETS)}", soft_wrap=True)
    for name, value in example.best_r2().items():
        out.print(f"best reachable R² of {name}: {value:.4f} (noise of deviation {synthetic_table.NOISE[name]:g})")
    out.print(f"next: duoka train informer --task regress --csv {shlex.quote(str(path))}", soft_wrap=True)
    return 0


def _movielens(options: argparse.Namespace) -> int:
    import torch

    from duoka.recipes.datasets import synthetic_movielens
    from duoka.recipes.datasets.movielens import ML1MDataset
    from duoka.recipes.datasets.movielens_format import NAMES
    from duoka.recipes.recommendation.baselines import Popularity
    from duoka.recipes.recommendation.ranking_metrics import RankingEvaluator

    sizes = {key: value for key in OWN["movielens"] if (value := getattr(options, key)) is not None}
    folder = Path(options.to or "movielens")
    _refuse_to_lose([folder / name for name in NAMES], options)
    _refuse_to_hide(folder)
    example = synthetic_movielens.make(**sizes, seed=options.seed)
    synthetic_movielens.write(folder, example, options.seed)
    out = console()
    counts = f"{len(example.genders):,} users, {len(example.titles):,} films, {len(example.users):,} ratings"
    out.print(f"wrote {folder}: {counts}, in the format of MovieLens-1M", soft_wrap=True)
    data = ML1MDataset(folder)
    task, law = RankingEvaluator.of(data, "test"), torch.from_numpy(example.utility).float()
    found = {
        "the law itself, the best reachable": law.__getitem__,
        "popularity": Popularity(task.seen, data.n_items).score_all,
    }
    for name, score in found.items():
        out.print(f"test ndcg@10 of {name}: {task.evaluate(score)['ndcg@10']:.4f}")
    out.print(f"next: duoka train movielens --root {folder} --pretrained none", soft_wrap=True)
    return 0


def _refuse_to_lose(files: Sequence[Path], options: argparse.Namespace) -> None:
    """Refuse to write over what is there: it may be the real data, in the same format."""
    from duoka.errors import ConfigError

    there = next((file for file in files if file.is_file()), None)
    if there is not None and not options.overwrite:
        raise ConfigError(f"{there} is there already: give another place with --to, or --overwrite to replace it")


def _refuse_to_hide(folder: Path) -> None:
    """Refuse a folder in which the official set lies a level deeper: what stands beside that would be read in its place."""
    from duoka.errors import ConfigError

    there = next((place for name in ("ml-1m", "ml-1m.zip") if (place := folder / name).exists()), None)
    if there is not None:
        raise ConfigError(f"{there} is there, which --root {folder} reads: give another place with --to")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("duoka data", description=f"{SUMMARY[0].upper()}{SUMMARY[1:]}.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    make = commands.add_parser("make", help="write example data", description="Write example data.")
    make.add_argument(
        "name",
        choices=list(OWN),
        help="datatry: a table of 10 features and 2 targets that follow a known law; movielens: people, films and ratings of "
        "known tastes in MovieLens-1M's format",
    )
    make.add_argument(
        "--to", metavar="PLACE", help="the file (default: datatry.csv), or the folder (default: movielens)"
    )
    make.add_argument("--overwrite", action="store_true", help="replace what is there")
    make.add_argument("--rows", type=int, metavar="N", help="datatry: how many rows (default: 10000)")
    make.add_argument("--users", type=int, metavar="N", help="movielens: how many people (default: 1000)")
    make.add_argument("--films", type=int, metavar="N", help="movielens: how many films (default: 800)")
    make.add_argument("--ratings", type=int, metavar="N", help="movielens: how many ratings (default: 60000)")
    make.add_argument(
        "--seed", type=int, default=0, metavar="N", help="other data by the same law (default: %(default)s)"
    )
    return parser
