"""``duoka eval RUN``: test the model of a finished run again."""

from collections.abc import Sequence

from duoka.cli.arguments import add_run, command_parser, load_run
from duoka.cli.train import print_outcome
from duoka.utils.argument_parser import ArgumentParser


def run(argv: Sequence[str]) -> int:
    """Evaluate the run that ``argv`` names and print its numbers; return the exit status."""
    finished, recipe, config = load_run(parser().parse(argv))
    print_outcome(recipe.evaluate(finished, config))
    return 0


def parser() -> ArgumentParser:
    """Return the command's parser."""
    parser = command_parser("eval")
    add_run(parser)
    return parser
