"""``duoka data make NAME``: example data with a known best possible result."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jsonargparse import Namespace

from duoka.cli.arguments import command_parser
from duoka.cli.console import console
from duoka.errors import ConfigError
from duoka.utils.argument_parser import ArgumentParser
from duoka.utils.text import duoka_command
from duoka.utils.validation import check_number, invalid_option

SIZES = {"datatry": {"rows": 10_000}, "movielens": {"users": 1000, "films": 800, "ratings": 60_000}}
"""Options for the size of each example, and their defaults."""
MAX_ROWS = 10_000_000


def run(argv: Sequence[str]) -> int:
    """Write the data that ``argv`` names and print the best reachable result; return the exit status."""
    if argv[:1] != ["make"]:
        whole = parser()
        add_subcommands(whole)
        whole.parse(argv)  # prints the help, or raises
    options = make_parser().parse(argv[1:])
    own = SIZES[options.name]
    for size in (size for sizes in SIZES.values() for size in sizes if size not in own):
        if options[size] is not None:
            names = ", ".join(f"--{name}" for name in own)
            raise ConfigError(f"--{size} is no size of {options.name}; its sizes are {names}")
    return _movielens(options) if options.name == "movielens" else _datatry(options)


def parser() -> ArgumentParser:
    """Return the command's parser."""
    return command_parser("data")


def add_subcommands(parser: ArgumentParser) -> None:
    """Add ``make`` to the command's parser."""
    commands = parser.add_subcommands(metavar="COMMAND", required=True)
    commands.add_subcommand("make", make_parser(), help="write example data")


def make_parser() -> ArgumentParser:
    """Return the parser of ``duoka data make``."""
    make = command_parser("data make", "write example data")
    make.add_argument(
        "name",
        type=Literal["datatry", "movielens"],
        metavar="{datatry,movielens}",
        help="datatry: a table of 10 features and 2 targets that are a known function; movielens: people, films and ratings "
        "of known tastes in MovieLens-1M's format",
    )
    text = "the file (default: datatry.csv), or the folder (default: movielens)"
    make.add_argument("--to", default=None, metavar="PATH", help=text)
    make.add_argument("--overwrite", action="store_true", help="replace existing files")
    for example, sizes in SIZES.items():
        for size, count in sizes.items():
            text = f"{example}: number of {size} (default: {count})"
            make.add_argument(f"--{size}", type=int, default=None, metavar="N", help=text)
    text = "other data of the same function (default: %(default)s)"
    make.add_argument("--seed", type=int, default=0, metavar="N", help=text)
    return make


def _datatry(options: Namespace) -> int:
    from duoka.recipes.datasets import synthetic_table

    rows = SIZES["datatry"]["rows"] if options.rows is None else options.rows
    if not 2 <= rows <= MAX_ROWS:
        raise invalid_option("--rows", rows, f"2 to {MAX_ROWS:,}")
    check_number("--seed", options.seed, 0, below=2**63)
    path = Path(options.to or "datatry.csv")
    _refuse_to_lose([path], options)
    example = synthetic_table.make(rows, options.seed)
    synthetic_table.write(path, example)
    out = console()
    out.print(f"wrote {path}: {rows:,} rows, 10 features, then {' and '.join(synthetic_table.TARGETS)}")
    for name, value in example.best_r2().items():
        out.print(f"best reachable R² of {name}: {value:.4f} (noise of deviation {synthetic_table.NOISE[name]:g})")
    out.print(f"next: {duoka_command('train', 'informer', '--task', 'regress', '--csv', path)}")
    return 0


def _movielens(options: Namespace) -> int:
    import torch

    from duoka.recipes.datasets import synthetic_movielens
    from duoka.recipes.datasets.movielens import ML1MDataset
    from duoka.recipes.datasets.movielens_format import NAMES
    from duoka.recipes.recommendation.baselines import Popularity
    from duoka.recipes.recommendation.ranking_metrics import RankingEvaluator

    sizes = {key: value for key in SIZES["movielens"] if (value := getattr(options, key)) is not None}
    folder = Path(options.to or "movielens")
    _refuse_to_lose([folder / name for name in NAMES], options)
    for official in (folder / "ml-1m", folder / "ml-1m.zip"):
        if official.exists():  # the recipe would read it instead of the example
            raise ConfigError(f"{official} is there, which --root {folder} reads: give another path with --to")
    example = synthetic_movielens.make(**sizes, seed=options.seed)
    synthetic_movielens.write(folder, example, options.seed)
    out = console()
    counts = f"{len(example.genders):,} users, {len(example.titles):,} films, {len(example.users):,} ratings"
    out.print(f"wrote {folder}: {counts}, in the format of MovieLens-1M")
    data = ML1MDataset(folder)
    task, utility = RankingEvaluator.of(data, "test"), torch.from_numpy(example.utility).float()
    popularity = Popularity(task.seen, data.n_items).score_all
    for name, score in (("the ground truth, the best reachable", utility.__getitem__), ("popularity", popularity)):
        out.print(f"test ndcg@10 of {name}: {task.evaluate(score)['ndcg@10']:.4f}")
    out.print(f"next: {duoka_command('train', 'movielens', '--root', folder, '--pretrained', 'none')}")
    return 0


def _refuse_to_lose(files: Sequence[Path], options: Namespace) -> None:
    """Refuse to overwrite files: they may be the real data, which have the same format."""
    there = next((file for file in files if file.is_file()), None)
    if there is not None and not options.overwrite:
        raise ConfigError(f"{there} exists already: give another path with --to, or --overwrite to replace it")
