"""The examples in docstrings run and give the results that they show."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import duoka

NOT_IMPORTED = {"duoka.__main__"}  # runs the command line
MODULES = [found.name for found in pkgutil.walk_packages(duoka.__path__, "duoka.") if found.name not in NOT_IMPORTED]


def examples_in(name: str) -> list[doctest.DocTest]:
    return [test for test in doctest.DocTestFinder().find(importlib.import_module(name)) if test.examples]


@pytest.mark.parametrize("name", [name for name in MODULES if examples_in(name)])
def test_the_examples_give_the_results_that_they_show(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner()
    for example in examples_in(name):
        runner.run(example)
    assert runner.summarize(verbose=False).failed == 0


def test_modules_that_users_call_have_examples():
    for name in ("duoka.launcher.api", "duoka.checkpoint.save_load", "duoka.trainer.trainer", "duoka.data.sharding"):
        assert examples_in(name), f"{name} has no example"
