"""The examples in the documentation strings of the checkpoint part run and give what they say."""

from __future__ import annotations

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["model", "names", "rng", "storage"])
def test_the_examples_are_true(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(f"duoka.checkpoint.{name}"))
    assert result.attempted > 0
    assert result.failed == 0
