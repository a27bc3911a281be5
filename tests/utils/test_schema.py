"""Forms of data from files: what fits, and the path of the key that does not."""

from typing import Any, Literal, NotRequired, TypedDict

import pytest

from duoka.errors import CheckpointError, DataError
from duoka.utils.schema import check_form, parse_json, read_json, template_fault


class Inner(TypedDict):
    name: str
    sizes: tuple[int, int]
    rates: NotRequired[list[float]]


class Outer(TypedDict):
    inner: Inner
    counts: dict[str, int]
    kind: Literal["a", "b"] | None


VALID: Any = {
    "inner": {"name": "x", "sizes": [1, 2], "rates": [1, 2.5]},
    "counts": {"a": 1},
    "kind": "a",
    "more": object,
}


def test_data_of_the_form_are_valid():
    check_form(VALID, Outer, "file", remedy="")
    check_form({**VALID, "kind": None, "inner": {"name": "x", "sizes": (1, 2)}}, Outer, "file", remedy="")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inner": []}, "file: inner is []; it must be a mapping of keys and values: fix it"),
        ({"inner": {"sizes": [1, 2]}}, "file: inner has no key 'name': fix it"),
        ({"inner": {"name": 3, "sizes": [1, 2]}}, "inner.name is 3; it must be text"),
        ({"inner": {"name": "x", "sizes": [1]}}, "inner.sizes has 1 items; it must have 2"),
        ({"inner": {"name": "x", "sizes": [1, True]}}, "inner.sizes[1] is True; it must be an integer"),
        ({"inner": {"name": "x", "sizes": "12"}}, "inner.sizes is '12'; it must be a list"),
        ({"inner": {**VALID["inner"], "rates": [float("nan")]}}, "inner.rates[0] is nan; it must be a finite number"),
        ({"counts": {"a": "1"}}, "counts.a is '1'; it must be an integer"),
        ({"counts": {1: 1}}, "counts: the key 1 is 1; it must be text"),
        ({"kind": "c"}, "kind is 'c'; it must be one of a, b"),
        ({"kind": "c" * 5000}, "kind is 'cccc"),
    ],
)
def test_the_path_of_the_key_that_does_not_fit_is_named(change, message):
    with pytest.raises(CheckpointError) as caught:
        check_form({**VALID, **change}, Outer, "file", remedy="fix it", error=CheckpointError)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 200


def test_the_content_itself_may_have_another_form():
    with pytest.raises(DataError, match=r"file: the content is \[\]; it must be a mapping"):
        check_form([], Outer, "file", remedy="fix it")


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "9" * 5000, '{"a": \x00}', "nul"])
def test_a_text_that_is_no_json_is_an_error_in_one_line(text):
    with pytest.raises(DataError, match=r"^cannot read file: it is not JSON: .*: fix it$") as caught:
        parse_json(text, dict[str, Any], "file", "fix it")
    assert len(str(caught.value)) < 200


def test_a_file_that_is_missing_or_no_text_is_an_error(tmp_path):
    with pytest.raises(DataError, match="No such file or directory: fix it"):
        read_json(tmp_path / "none.json", dict[str, Any], "fix it")
    (tmp_path / "a.json").write_bytes(b"\xff")
    with pytest.raises(DataError, match="it is not UTF-8 text: fix it"):
        read_json(tmp_path / "a.json", dict[str, Any], "fix it")


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ({"a": 1, "b": [1, 2.0], "c": {1: 2}}, ""),
        ({"a": 1.5, "b": (1, 2), "c": {3: 4, 5: 6}}, ""),
        ({"a": 1, "b": [1, 2]}, "s has other keys than it must have (c)"),
        ([], "s has other keys than it must have (list)"),
        ({"a": "1", "b": [1, 2], "c": {}}, "s.a is '1'; it must be an integer"),
        ({"a": 1, "b": [1], "c": {}}, "s.b is [1]; it must be a list of 2"),
        ({"a": 1, "b": [1, None], "c": {}}, "s.b[1] is None; it must be a finite number"),
    ],
)
def test_saved_state_is_compared_with_the_present_state(value, fault):
    assert template_fault(value, {"a": 0, "b": [0, 0.5], "c": {1: 1}}, "s") == fault
