"""Flags of every command, frozen in ``flags.txt``, and the completion script that is made of them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from duoka.cli.completion import whole_parser
from duoka.cli.main import main

FROZEN = Path(__file__).parent / "flags.txt"


def flags_of(parser: Any, command: str = "duoka") -> Iterator[str]:
    """Yield a line for each command: its name, its arguments and its flags."""
    subcommands = parser._subcommands_action
    names = []
    for action in parser._actions:
        if action is not subcommands:
            names += action.option_strings or [action.metavar or action.dest]
    yield f"{command}: {' '.join(name for name in names if name not in ('-h', '--help'))}".rstrip()
    for name, child in (subcommands.choices if subcommands else {}).items():
        yield from flags_of(child, f"{command} {name}")


def test_flags_of_every_command_are_the_frozen_ones() -> None:
    assert list(flags_of(whole_parser())) == FROZEN.read_text("utf-8").splitlines()


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_completion_script_knows_commands_recipes_and_options(shell: str, capfd, tmp_path: Path) -> None:
    assert main(["completion", shell]) == 0
    script = capfd.readouterr().out
    for word in ("devices", "tiny-imagenet", "--batch_size", "resnet18"):
        assert word in script
    if shutil.which(shell):
        (tmp_path / "script").write_text(script)
        subprocess.run([shell, "-n", tmp_path / "script"], check=True, timeout=60)


def test_a_shell_without_completion_is_refused(capfd) -> None:
    assert main(["completion", "fish"]) == 2
    assert "shell='fish' is not valid: it must be one of bash, zsh, tcsh" in capfd.readouterr().err
