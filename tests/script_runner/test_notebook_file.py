"""Notebooks that were edited by hand: refused in one line before any cell runs."""

import json
import os

import pytest

from duoka.errors import ConfigError
from duoka.script_runner.notebook import run_notebook

CELL = {"id": "a", "cell_type": "code", "metadata": {}, "source": "1", "outputs": [], "execution_count": None}
BOOK = {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [CELL]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a valid notebook"),
        ("{}", "is not a valid notebook"),
        ("[" * 100_000, "is not a valid notebook"),
        (json.dumps({**BOOK, "nbformat": "x"}), "is not a valid notebook"),
        (json.dumps({**BOOK, "metadata": {"kernelspec": []}}), r"metadata.kernelspec is \[\]; it must be a mapping"),
        (json.dumps({**BOOK, "metadata": {"kernelspec": {"name": "none"}}}), "names the kernel 'none', which is not"),
        (json.dumps({**BOOK, "cells": [{**CELL, "cell_type": {}}]}), r"not a valid notebook|cells\[0\].cell_type is"),
        (json.dumps({**BOOK, "cells": [{**CELL, "source": 3}]}), r"not a valid notebook|cells\[0\].source is 3"),
    ],
)
def test_a_file_of_another_form_is_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "a.ipynb"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        run_notebook(path, "cpu")
    assert "\n" not in str(caught.value)
    assert [one.name for one in tmp_path.iterdir()] == ["a.ipynb"]


def test_a_pipe_is_no_notebook(tmp_path):
    os.mkfifo(tmp_path / "a.ipynb")
    with pytest.raises(ConfigError, match="it is a pipe, a socket or a device"):
        run_notebook(tmp_path / "a.ipynb", "cpu")
