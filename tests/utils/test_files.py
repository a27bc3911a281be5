"""Safe names of files made of data, and reads that neither wait nor take more than is allowed."""

import os
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duoka.utils.files import atomic_write, is_file, open_file, read_file, safe_name, safe_names


@given(st.text(max_size=300))
def test_a_safe_name_is_one_file_in_its_folder(text):
    name = safe_name(text)
    assert name == os.path.basename(name)
    assert name[0] not in ".-"
    assert len(f"{name}.png".encode()) < 200
    assert safe_name(name) == name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("../../.ssh/authorized_keys", "ssh-authorized_keys"), ("aquarium fish", "aquarium-fish"), ("油温", "油温"),
        ("a\0b\nc", "a-b-c"), ("lr=0.1 a+b", "lr=0.1-a+b"), ("..", "unnamed"), ("", "unnamed"),
    ],
)  # fmt: skip
def test_characters_of_paths_become_dashes(text, name):
    assert safe_name(text) == name


@given(st.lists(st.text("aAb/.", max_size=3), max_size=8))
def test_safe_names_differ_where_case_does_not_count(texts):
    names = safe_names(texts)
    assert len({name.casefold() for name in names}) == len(texts)


def test_a_regular_file_is_read_up_to_its_limit(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    (tmp_path / "link").symlink_to(path)
    assert read_file(path, 5) == read_file(tmp_path / "link", 5) == b"12345"
    with pytest.raises(OSError, match="it has 5 bytes, and at most 4 bytes are read"):
        read_file(path, 4)


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, reason in (
        (tmp_path / "pipe", "a pipe, a socket or a device"),
        ("/dev/zero", "a pipe, a socket or a device"),
        (tmp_path, "Is a directory"),
        (tmp_path / "none", "No such file"),
        (tmp_path / ("x" * 300), "File name too long"),
        ("a\0b", "characters that no file name can have"),
        ("\ud800", "characters that no file name can have"),
    ):
        with pytest.raises(OSError, match=reason):
            open_file(path)
        assert not is_file(path)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_an_error_that_is_its_own_cause_is_raised_as_it_is(tmp_path):
    error = ValueError("mine")
    error.__cause__ = error
    with pytest.raises(ValueError, match="mine"), atomic_write(tmp_path / "file"):
        raise error
