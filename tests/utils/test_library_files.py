"""Installed libraries are known wherever they are installed, and the user's code is none."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from duoka.utils.library_files import is_library_file


def test_python_and_packages_are_libraries_and_this_file_is_not() -> None:
    assert is_library_file(json.__file__)
    assert is_library_file(np.__file__)
    assert not is_library_file(__file__)


@pytest.mark.parametrize("folder", [".local/lib/python3.11/site-packages", "usr/lib/python3/dist-packages"])
def test_folders_for_packages_hold_libraries_wherever_they_are(folder: str, tmp_path: Path) -> None:
    assert is_library_file(f"{tmp_path}/{folder}/tool/__init__.py")


def test_a_library_beside_its_record_is_one_and_code_beside_it_is_not(tmp_path: Path) -> None:
    (tmp_path / "tool-1.0.dist-info").mkdir()
    (tmp_path / "tool-1.0.dist-info/RECORD").write_text("tool/__init__.py,sha256=a,2\nsingle.py,,\n")
    assert is_library_file(f"{tmp_path}/tool/inner/part.py")
    assert is_library_file(f"{tmp_path}/single.py")
    assert not is_library_file(f"{tmp_path}/train.py")
    assert not is_library_file(f"{tmp_path}/project/tool/model.py")


def test_code_of_the_user_below_the_folder_of_python_is_no_library(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert not is_library_file(f"{tmp_path}/src/app/train.py")
