"""``duoka completion bash``: a script that completes duoka's commands and options in a shell."""

import importlib
import sys
from collections.abc import Sequence
from typing import Literal

from duoka.cli.arguments import command_parser
from duoka.cli.main import COMMANDS
from duoka.utils.argument_parser import ArgumentParser


def run(argv: Sequence[str]) -> int:
    """Print the completion script for the shell that ``argv`` names; return the exit status."""
    shell = parser().parse(argv).shell
    whole = whole_parser()
    whole.offer_choices()
    sys.stdout.write(whole.get_completion_script(f"shtab-{shell}") + "\n")
    return 0


def parser() -> ArgumentParser:
    """Return the command's parser."""
    epilog = (
        "bash: duoka completion bash > ~/.local/share/bash-completion/completions/duoka; zsh: duoka completion zsh > _duoka, "
        "in a folder of $fpath. The command takes some seconds, as it imports every recipe to read its options."
    )
    parser = command_parser("completion", epilog=epilog)
    parser.add_argument("shell", type=Literal["bash", "zsh", "tcsh"], metavar="{bash,zsh,tcsh}", help="the shell")
    return parser


def whole_parser() -> ArgumentParser:
    """Return the parser of the whole command, with every subcommand and recipe."""
    whole = ArgumentParser("duoka", "Train a PyTorch model on every device you have.")
    commands = whole.add_subcommands(metavar="COMMAND")
    for name, summary in COMMANDS.items():
        module = importlib.import_module(f"duoka.cli.{name}")
        subparser = module.parser()
        commands.add_subcommand(name, subparser, help=summary)
        if hasattr(module, "add_subcommands"):
            module.add_subcommands(subparser)
    return whole
