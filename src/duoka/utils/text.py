"""Numbers, names, suggestions and commands as text for messages."""

import difflib
import shlex
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path


def did_you_mean(word: object, choices: Iterable[object], cutoff: float = 0.6) -> str:
    """Return ``"did you mean 'x'?"`` for the choice closest to ``word``, or ``""`` if none is close.

    >>> did_you_mean("adm", ["adam", "sgd"])
    "did you mean 'adam'?"
    """
    close = difflib.get_close_matches(str(word).lower(), [str(choice) for choice in choices], n=1, cutoff=cutoff)
    return f"did you mean {close[0]!r}?" if close else ""


def plural(count: int, noun: str, nouns: str | None = None) -> str:
    """Return a count with its noun.

    >>> plural(1, "device"), plural(2, "device"), plural(2, "batch", "batches")
    ('1 device', '2 devices', '2 batches')
    """
    return f"{count:,} {noun if count == 1 else nouns or noun + 's'}"


def join_names(names: Iterable[object], last: str = "and") -> str:
    """Return names as a list in a sentence.

    >>> join_names(["a", "b", "c"])
    'a, b and c'
    """
    *rest, final = [str(name) for name in names] or [""]
    return f"{', '.join(rest)} {last} {final}" if rest else final


def format_bytes(count: float) -> str:
    """Return a number of bytes in decimal units.

    >>> format_bytes(512), format_bytes(2_340_000)
    ('512 bytes', '2.34 MB')
    """
    if count < 1e5:
        return f"{count:.0f} bytes"
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def format_duration(seconds: float) -> str:
    """Return a time span with the unit that suits it.

    >>> format_duration(0.0042), format_duration(7.25), format_duration(75), format_duration(7260)
    ('4.2 ms', '7.2 s', '1 min 15 s', '2 h 1 min')
    """
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def first_line(text: object) -> str:
    """Return the first line of a text or of an exception's message that is not empty."""
    lines: Sequence[str] = [line.strip() for line in str(text).splitlines() if line.strip()]
    return lines[0] if lines else type(text).__name__ if isinstance(text, BaseException) else ""


def shorten(text: str, longest: int = 80) -> str:
    """Return ``text`` for a message, without its middle where it is longer than ``longest`` characters.

    >>> shorten("1234567890" * 9, 20)
    '12345678 ... 4567890'
    """
    half = (longest - 4) // 2
    return text if len(text) <= longest else f"{text[:half]} ... {text[-(longest - 5 - half) :]}"


def duoka_command(*words: object) -> str:
    """Return a command line of this installation's ``duoka``, to paste into a shell in the current folder.

    >>> duoka_command("eval", "runs/a run").endswith("duoka eval 'runs/a run'")
    True
    """
    script = Path(sys.argv[0]) if Path(sys.argv[0]).name == "duoka" else Path(sys.executable).with_name("duoka")
    found = shutil.which("duoka")
    if not script.is_file():
        command = [sys.executable, "-m", "duoka"]
    elif found and script.samefile(found):
        command = ["duoka"]
    else:
        script, here = script.absolute(), Path.cwd()
        command = [str(script.relative_to(here) if script.is_relative_to(here) else script)]
    return shlex.join([*command, *map(str, words)])
