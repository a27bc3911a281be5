"""``duoka compare FILE.yml``: variants of a recipe trained and compared."""

from collections.abc import Sequence

from duoka.cli.arguments import command_parser
from duoka.cli.console import console, print_error
from duoka.errors import ConfigError, TrainingInterrupted
from duoka.utils.argument_parser import ArgumentParser
from duoka.utils.signals import StopSignals

OWN = ("source", "sweep", "parallel", "out")


def run(argv: Sequence[str]) -> int:
    """Train the unfinished variants that ``argv`` names and print the table; return 1 if a variant failed, else 0."""
    options = parser(_recipe_of(argv)).parse(argv, defaults=False).as_dict()
    from duoka.recipes.experiments import read_experiment, result_rows, run_all, write_summary
    from duoka.recipes.experiments.results import HEADINGS, format_rows

    if options.get("source") is None:
        raise ConfigError(
            "nothing to compare: write `duoka compare FILE.yml`, or `duoka compare cifar100 --sweep lr=0.001,0.01`"
        )
    changes = {name: value for name, value in options.items() if name not in OWN}
    plan = read_experiment(
        options["source"], out=options.get("out", "runs"), sweep=options.get("sweep", ()), changes=changes
    )
    out = console()
    parallel = options.get("parallel", False)
    try:
        with StopSignals():
            failed = run_all(plan, parallel=parallel, report=lambda text: out.print(f"== {text}"))
    except (KeyboardInterrupt, TrainingInterrupted):
        print_error("the comparison is not complete; the same command continues it")
        raise
    rows = result_rows(plan)
    if rows:
        from rich.table import Table

        table = Table(*HEADINGS, title=f"{plan.name}: {plan.metric}")
        for line in format_rows(plan, rows):
            table.add_row(*line)
        out.print(table, soft_wrap=False)
        out.print(f"pictures: {write_summary(plan, rows)}")
    for title, error in failed.items():
        print_error(f"{title} failed: {error.rstrip('.')}; the same command tries it again")
    return 1 if failed else 0


def parser(recipe: str | None = None) -> ArgumentParser:
    """Return the command's parser, with the options of ``recipe`` if one is named."""
    parser = command_parser(
        "compare",
        usage="duoka compare FILE.yml|RECIPE [--sweep KEY=VALUE,VALUE] [--parallel] [--out DIR] [--KEY VALUE] ...",
        epilog="`duoka compare RECIPE --help` lists the keys of a recipe.",
    )
    text = "a file of variants, or a recipe with --sweep"
    parser.add_argument("source", nargs="?", default=None, metavar="FILE.yml|RECIPE", help=text)
    parser.add_argument(
        "--sweep", action="append", metavar="KEY=VALUE,VALUE", help="values of a key to compare; repeatable"
    )
    parser.add_argument("--parallel", action="store_true", help="train one variant on each device, not each on all")
    parser.add_argument("--out", default="runs", metavar="DIR", help="folder of all runs (default: %(default)s)")
    if recipe is not None:
        from duoka.recipes.common.config import add_options
        from duoka.recipes.common.registry import find_recipe

        add_options(parser, find_recipe(recipe).Config, recipe, without=OWN)
    return parser


def _recipe_of(argv: Sequence[str]) -> str | None:
    """Return the recipe that the command line compares: it names the recipe, or a file that does."""
    from duoka.recipes.common.registry import RECIPES
    from duoka.utils.yaml_file import read_yaml

    source = next((word for word in argv if word in RECIPES or word.endswith((".yml", ".yaml"))), None)
    if source is None or source in RECIPES:
        return source
    recipe = read_yaml(source).get("recipe")
    return recipe if isinstance(recipe, str) and recipe in RECIPES else None
