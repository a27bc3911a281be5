"""The ``duoka`` command: dispatch, exit statuses, and the place where errors become messages."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import duoka
from duoka.cli import main as cli
from duoka.cli.main import COMMANDS, main

DUOKA = [sys.executable, "-m", "duoka"]


def command(body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Register a subcommand ``try`` whose ``run(argv)`` has this body."""
    (tmp_path / "try.py").write_text(f"def run(argv):\n{textwrap.indent(textwrap.dedent(body), '    ')}")
    monkeypatch.setattr("duoka.cli.__path__", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "duoka.cli.try", raising=False)
    importlib.invalidate_caches()
    monkeypatch.setitem(COMMANDS, "try", "a test's own")


@pytest.fixture
def trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """Run a command line against a subcommand ``try`` of the given body; returns status, output and errors."""

    def run(body: str, *words: str) -> tuple[int, str, str]:
        command(body, tmp_path, monkeypatch)
        status = main(words or ["try"])
        return (status, *capfd.readouterr())

    return run


def test_a_subcommand_gets_its_arguments_and_gives_the_status(trial) -> None:
    status, output, _ = trial("print(argv); return 7", "try", "--a", "b")
    assert (status, output) == (7, "['--a', 'b']\n")


@pytest.mark.parametrize("words", [("--debug", "try", "a"), ("try", "--debug", "a"), ("try", "a", "--debug")])
def test_debug_may_stand_anywhere_and_shows_the_traceback(trial, words: tuple[str, ...]) -> None:
    status, _, errors = trial(
        "from duoka.errors import DataError; assert argv == ['a']; raise DataError('bad')", *words
    )
    assert status == 2
    assert "Traceback" in errors
    assert errors.endswith("duoka: bad\n")


def test_words_after_two_dashes_belong_to_the_subcommand(trial) -> None:
    status, output, _ = trial("print(argv); return 0", "try", "--", "--debug")
    assert (status, output) == (0, "['--', '--debug']\n")


@pytest.mark.parametrize(
    "name", ["ConfigError", "DeviceError", "StorageError", "LaunchError", "MissingDependencyError"]
)
def test_an_error_of_duoka_is_one_message_without_a_traceback(trial, name: str) -> None:
    body = f"from duoka.errors import {name}; raise {name}('what [bold]and[/] where') from ValueError('inner')"
    assert trial(body) == (2, "", "duoka: what [bold]and[/] where\n")


@pytest.mark.parametrize(
    ("number", "message"), [("ENOSPC", "disk is full"), ("EACCES", "not permitted"), ("EROFS", "read-only")]
)
def test_a_full_or_unwritable_folder_is_one_message_that_names_it(trial, number: str, message: str) -> None:
    status, _, errors = trial(f"import errno; raise OSError(errno.{number}, 'text', '/runs/a b')")
    assert status == 2
    assert errors.count("\n") == 1
    assert "'/runs/a b'" in errors
    assert message in errors


@pytest.mark.parametrize("error", ["ValueError('own')", "OSError(5, 'own')", "BrokenPipeError(32, 'own')"])
def test_an_unexpected_error_keeps_its_traceback(trial, error: str) -> None:
    status, _, errors = trial(f"raise {error}")
    assert status == 1
    assert "Traceback" in errors
    assert "own" in errors


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "there is no command 'trian'; did you mean 'train'?"),
        (["xyzzy"], "there is no command 'xyzzy'; `duoka --help`"),
        (["--versoin"], "there is no option '--versoin'; did you mean '--version'?"),
    ],
)
def test_an_unknown_word_is_an_error_with_a_suggestion(
    words: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    output, errors = capfd.readouterr()
    assert output == ""
    assert errors.startswith(f"duoka: {message}")
    assert errors.count("\n") == 1


def test_help_lists_every_command_and_no_command_is_a_usage_error(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capfd.readouterr().out
    assert [name for name, summary in COMMANDS.items() if f"  {name}" not in text or summary not in text] == []
    assert main([]) == 2
    assert capfd.readouterr() == ("", text)


def test_help_of_a_command_is_the_same_in_both_forms(capfd: pytest.CaptureFixture[str]) -> None:
    shown = []
    for words in (["help", "devices"], ["devices", "--help"]):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 0
        shown.append(capfd.readouterr().out)
    assert shown[0] == shown[1]
    assert "usage: duoka devices" in shown[0]
    assert main(["help"]) == 0
    assert "usage: duoka COMMAND" in capfd.readouterr().out
    assert main(["help", "trian"]) == 2
    assert "did you mean 'train'?" in capfd.readouterr().err


def test_every_command_is_a_module_with_run_and_parser() -> None:
    for name in COMMANDS:
        module = importlib.import_module(f"duoka.cli.{name}")
        assert callable(module.run)
        assert module.parser().prog == f"duoka {name}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval"], "the following arguments are required: run; see `duoka eval --help`"),
        (["eval", "a", "b"], "'b' belongs to no option"),
        (["check", "--device"], "--device needs a value"),
        (["check", "--divice", "cpu"], "unknown option --divice; did you mean '--device'?"),
        (["predict", "x", "--top", "many"], "--top='many' is not valid: it must be an integer"),
        (
            ["data", "make", "datatri"],
            "name='datatri' is not valid: it must be one of datatry, movielens; did you mean",
        ),
        (["data"], "see `duoka data --help`"),
        (
            ["compare", "cifar100", "--sweep", "lr=1,2", "--epoks", "3"],
            "unknown option --epoks; did you mean '--epochs'?",
        ),
    ],
)
def test_a_wrong_command_line_is_one_message(words: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    output, errors = capfd.readouterr()
    assert output == ""
    assert errors.count("\n") == 1
    assert message in errors


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_import_nothing_heavy(option: str) -> None:
    program = (
        f"import sys; from duoka.cli.main import main; status = main([{option!r}]);"
        "print(*{'torch', 'rich', 'numpy', 'matplotlib', 'jsonargparse', 'yaml'} & set(sys.modules)); sys.exit(status)"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout.splitlines()[-1] == ""


def test_the_module_is_the_command() -> None:
    ran = subprocess.run([*DUOKA, "--version"], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout == f"duoka {duoka.__version__}\n"
    ran = subprocess.run([*DUOKA, "nonsense"], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 2


def started(tmp_path: Path, body: str) -> subprocess.Popen[str]:
    """Start a process that runs a subcommand of this body."""
    (tmp_path / "try.py").write_text(f"def run(argv):\n{textwrap.indent(textwrap.dedent(body), '    ')}")
    program = (
        "import sys; import duoka.cli; from duoka.cli.main import COMMANDS, main;"
        f"duoka.cli.__path__.append({str(tmp_path)!r}); COMMANDS['try'] = ''; sys.exit(main(['try']))"
    )
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_an_interruption_is_one_line_and_status_130(tmp_path: Path) -> None:
    process = started(tmp_path, "import time; print('on', flush=True); time.sleep(60)")
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "on\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60)[1] == "duoka: interrupted\n"
    assert process.returncode == cli.INTERRUPTED == 130


def test_closed_output_leaves_no_open_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as output, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", output)
        before = os.dup(writing)  # the lowest free number
        os.close(before)
        assert cli._is_output_closed()
        after = os.dup(writing)
        os.close(after)
    assert before == after


def test_closed_output_causes_no_error_message(tmp_path: Path) -> None:
    process = started(tmp_path, "for number in range(100_000):\n    print(number)\nreturn 0")
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_ctrl_c_while_libraries_are_imported_ends_the_command_at_once(tmp_path):
    """A library that catches everything while it is imported must not swallow the interruption."""
    (tmp_path / "torch.py").write_text(
        "import time\nprint('importing', flush=True)\ntry:\n    time.sleep(60)\nexcept BaseException:\n    pass\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "duoka", "devices"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=20)
    assert (process.returncode, message) == (130, "duoka: interrupted\n")
