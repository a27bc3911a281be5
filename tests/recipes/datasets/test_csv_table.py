"""CSV files in many forms: reading, and errors with line and column."""

import math

import pytest
import torch

from duoka.errors import ConfigError, DataError
from duoka.recipes.datasets import csv_table
from duoka.recipes.datasets.csv_table import Standardization


@pytest.fixture
def file(tmp_path):
    def write(content: str | bytes):
        path = tmp_path / "t.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.mark.parametrize(
    "content",
    [
        "a,b\n1,2.5\n3,-4e-1\n",
        "a,b\r\n1,2.5\r\n3,-4e-1\r\n",
        b"\xef\xbb\xbfa,b\n1,2.5\n3,-4e-1\n",
        "a;b\n1;2.5\n3;-4e-1\n",
        "a;b\n1;2,5\n3;-4e-1\n",
        "a\tb\n1\t2.5\n3\t-4e-1",
        'a, b\n\n"1", 2.5 \n3, -4e-1\n\n',
        "\na;b\n1;2,5\n3;-4e-1\n",
    ],
)
def test_separators_byte_order_marks_and_line_ends_do_not_matter(file, content):
    found = csv_table.read(file(content))
    assert found.columns == ("a", "b")
    assert found.numbers([0, 1]).tolist() == [[1, 2.5], [3, -0.4]]


def test_separators_within_quotes_are_not_counted(file):
    found = csv_table.read(file('"flow, m3/s, mean";b\n1;2\n'))
    assert found.columns == ("flow, m3/s, mean", "b")
    assert found.find_columns("flow, m3/s, mean") == [0]


def test_columns_are_found_by_name_position_and_range(file):
    found = csv_table.read(file("a,b,c,2\n1,2,3,4\n"))
    assert found.find_columns("c,a") == [2, 0]
    assert found.find_columns("1-2, c") == [0, 1, 2]
    assert found.find_columns("2") == [3]  # a name goes before a position
    for wanted, message in {
        "bb": "no column 'bb'",
        "9": "its 4 columns are a; b; c; 2",
        "3-1": "3-1",
        ",": "no column",
    }.items():
        with pytest.raises(ConfigError, match=message):
            found.find_columns(wanted)
    with pytest.raises(ConfigError, match="no column 'temperature'"):
        found.find_name("temperature")
    with pytest.raises(ConfigError, match="did you mean 'OT'"):
        csv_table.read(file("date,OT\n1,2\n")).find_columns("ot")
    assert found.find_column("c") == 2
    with pytest.raises(ConfigError, match=r"'1-2' names 2 columns of .*: name one"):
        found.find_column("1-2")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty: the first line must hold the columns' names"),
        ("a,b\n", "names of columns and no row"),
        ("1,2\n3,4\n", "line 1: numbers where the columns' names should be"),
        ("a,a\n1,2\n", "line 1: column 2 has the name 'a' again"),
        ("a,,c\n1,2,3\n", "line 1: column 2 has no name"),
        (
            "a,b\n1,2\n\n3,4,5\n",
            r"line 4: 3 columns where the first line has 2; .* extra column is 3, '5'",
        ),
        ("a,b\n1,2\n3\n", r"line 3: 1 column where the first line has 2; .* missing column is 2 \(b\)"),
        (b"a,b\n1,2\n3,\xff\n", "line 3: not UTF-8 text"),
        (b'a,b\n1,"2\n', "line"),
    ],
)
def test_file_that_is_no_table_is_an_error_with_its_line(file, content, message):
    with pytest.raises(DataError, match=message):
        csv_table.read(file(content)).numbers([0, 1])


def test_row_with_a_missing_column_is_named(file):
    rows = [",".join(str(number) for number in range(12)) for _ in range(20)]
    rows[13] = rows[13].rpartition(",")[0]
    with pytest.raises(DataError, match=r"line 15: 11 columns where the first line has 12; .* missing column is 12"):
        csv_table.read(file("\n".join([",".join("abcdefghijkl"), *rows])))


def test_missing_file_is_named_with_a_suggestion(tmp_path):
    with pytest.raises(DataError, match=r"there is no file .*none\.csv"):
        csv_table.read(tmp_path / "none.csv")
    with pytest.raises(DataError, match=r"cannot read .*: give a CSV file"):
        csv_table.read(tmp_path)
    (tmp_path / "sales_2020.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match=r"no file .*sales_2021\.csv: did you mean 'sales_2020\.csv'"):
        csv_table.read(tmp_path / "sales_2021.csv")


@pytest.mark.parametrize("cell", ["x", "1_000", "inf", "1 2", "12:30"])
def test_cells_that_are_no_numbers_are_named_by_line_and_column(file, cell):
    found = csv_table.read(file(f"a,b\n1,2\n3,{cell}\n"))
    with pytest.raises(DataError, match=rf"1 cell where a number should be: '{cell}' in line 3, column 2 \(b\)"):
        found.numbers([0, 1], fill=True)
    assert found.numbers([0]).tolist() == [[1], [3]]


@pytest.mark.parametrize("cell", ["", "NaN", "NA", " null "])
def test_missing_values_are_named_or_interpolated(file, cell):
    found = csv_table.read(file(f"a,b\n{cell},1\n2,{cell}\n{cell},3\n8,4\n{cell},5\n"))
    with pytest.raises(
        DataError, match=r"4 missing values: line 2, column 1 \(a\); line 3, column 2 \(b\); .*--fill true"
    ):
        found.numbers([0, 1])
    assert found.numbers([0, 1], fill=True).tolist() == [[2, 1], [2, 2], [5, 3], [8, 4], [8, 5]]


def test_decimal_comma_in_a_file_with_tabs_is_explained(file):
    with pytest.raises(DataError, match=r"'1,5' in line 2, column 1 \(a\); write 1\.5 for 1,5"):
        csv_table.read(file("a\tb\n1,5\t2\n")).numbers([0])


def test_column_without_any_value_cannot_be_filled(file):
    found = csv_table.read(file("a,b\n1,\n2,\n"))
    with pytest.raises(DataError, match="column 'b' has no value at all"):
        found.numbers([0, 1], fill=True)


def test_written_table_is_read_back(tmp_path):
    csv_table.write(tmp_path / "new" / "t.csv", ["a", "b,c"], [[1.5, "x"], [math.pi, "y"], [1.6e9 + 2, "z"]])
    found = csv_table.read(tmp_path / "new" / "t.csv")
    assert found.columns == ("a", "b,c")
    assert found.numbers([0]).tolist() == [[1.5], [3.141592654], [1_600_000_002.0]]


def test_standardization_is_inverted_and_warns_of_constant_columns(caplog):
    rows = torch.tensor([[1.0, 7.0], [3.0, 7.0]], dtype=torch.float64)
    scaling = Standardization.fit(rows, ["a", "b"])
    assert scaling == Standardization((2.0, 7.0), (1.0, 1.0))
    assert "column 'b' is 7 in every training row" in caplog.text
    other = torch.tensor([[5.0, 9.0]], dtype=torch.float64)
    assert scaling.transform(other).tolist() == [[3.0, 2.0]]
    assert torch.equal(scaling.inverse_transform(scaling.transform(other)), other)
    assert scaling.select([1]) == Standardization((7.0,), (1.0,))


def test_tiny_numbers_are_standardized_exactly():
    rows = torch.tensor([[1.0, 5.0], [3.0, 5.0]], dtype=torch.float64)
    expected = [[-1, 0], [1, 0]]
    for unit in (1e-15, 1e-60):  # permeability in square metres is the first
        assert Standardization.fit(rows * unit, ["a", "same"]).transform(rows * unit).tolist() == expected


def test_small_changes_far_from_0_are_standardized_exactly():
    seconds = torch.tensor([[1.6e9], [1.6e9 + 2]], dtype=torch.float64)
    scaling = Standardization.fit(seconds, ["seconds"])
    assert scaling.transform(seconds).tolist() == [[-1], [1]]
    assert torch.equal(scaling.inverse_transform(scaling.transform(seconds)), seconds)


def test_numbers_whose_squares_overflow_are_an_error():
    with pytest.raises(DataError, match=r"column 'a' has numbers as large as 3e\+300, which overflow"):
        Standardization.fit(torch.tensor([[1.0], [3e300]], dtype=torch.float64), ["a"])
