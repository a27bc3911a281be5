"""YAML files from anywhere: what is read, and what is refused in one line."""

import resource

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from duoka.errors import ConfigError
from duoka.utils.yaml_file import MAX_BYTES, MAX_VALUES, parse_yaml, read_yaml

BOMB = "x: &a [v,v,v,v,v,v,v,v,v]\n" + "".join(
    f"x{next_}: &{next_} [{','.join([f'*{name}'] * 9)}]\n" for name, next_ in zip("abcdefgh", "bcdefghi", strict=True)
)
MANY_KEYS = "".join(f"key{number}: {number}\n" for number in range(MAX_VALUES))
TEXT = st.text(st.characters(blacklist_categories=["Cs", "Cc"], blacklist_characters="\ufeff"), max_size=30)


@pytest.mark.parametrize(
    "written", ["2001-99-99", "0b_", "1:30", "no", "1e3", "0x1F", "007", "9" * 5000, ".inf", "=", "1_000", "~x"]
)
def test_a_scalar_stays_the_text_that_is_written(written):
    assert parse_yaml(f"key: {written}", "here") == {"key": written}


def test_only_an_unquoted_null_is_none():
    assert parse_yaml("[null, ~, 'null', '']", "here") == [None, None, "null", ""]


def test_aliases_and_merged_keys_are_read():
    text = "base: &base {lr: 1, epochs: 2}\nother: *base\nmore: {<<: *base, lr: 3}\nall: {<<: [{lr: 9}, *base]}"
    base = {"lr": "1", "epochs": "2"}
    assert parse_yaml(text, "here") == {
        "base": base,
        "other": base,
        "more": {"epochs": "2", "lr": "3"},
        "all": {"epochs": "2", "lr": "9"},
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "line 4: the file has more than 5,000 values, aliases included"),
        (MANY_KEYS, "the file has more than 5,000 values"),
        ("a: &a {x: *a}", r"line 1: the alias \*a has no complete value"),
        ("a: *b", r"line 1: the alias \*b has no complete value"),
        ("x: " + "[" * 3000, "line 1: the values are nested deeper than 20 levels"),
        ("x: " + "{a: " * 3000, "line 1: the values are nested deeper than 20 levels"),
        ("".join(f"{' ' * depth}a:\n" for depth in range(300)), "nested deeper than 20 levels"),
        ("a: !!timestamp x", "line 1: the tag 'tag:yaml.org,2002:timestamp' is not supported"),
        ("a: !!python/object/apply:os.system [ls]", "line 1: the tag .* is not supported"),
        ("!!str a: 1", "line 1: a key must be plain text"),
        ("[1]: 2", "line 1: a key must be plain text"),
        ("a: 1\n---\nb: 2", "line 2: a second document begins"),
        ("a: 1\nb: {c: 1, c: 2}", "`c` is set in line 2 and in line 2"),
        ("a: {<<: text}", "line 1: << takes the keys of a mapping"),
        ("a: \x00", "not valid YAML"),
        ("a: 'x", "line 1: not valid YAML"),
    ],
)
def test_a_text_that_is_not_plain_is_refused_in_one_line(text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_yaml(text, "config.yml")
    assert str(caught.value).startswith("config.yml")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_bomb_of_aliases_takes_little_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConfigError):
        parse_yaml(BOMB, "here")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def test_a_file_that_is_too_large_or_no_text_is_refused(tmp_path):
    path = tmp_path / "config.yml"
    path.write_text("#" * (MAX_BYTES + 1))
    with pytest.raises(ConfigError, match=r"config.yml: it has 0.10 MB, and at most 0.10 MB are read"):
        read_yaml(path)
    path.write_bytes(b"a: \xff")
    with pytest.raises(ConfigError, match="it is not UTF-8 text"):
        read_yaml(path)


@given(st.dictionaries(TEXT, TEXT | st.none() | st.lists(TEXT, max_size=3), max_size=5))
def test_what_pyyaml_writes_is_read_as_it_was(document):
    written = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
    assert (parse_yaml(written, "here") or {}) == document
