"""Files of rows: their kinds, what is wrong with them, and how the place of a row is called."""

import gzip
import json
from pathlib import Path

import pytest

from rlif_lightning.data.files import is_data_file, read_rows
from rlif_lightning.data.problems import Source, read_problems
from rlif_lightning.errors import UserError


def rows_of(path, content):
    content = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(content) if path.name.lower().endswith(".gz") else content)
    return list(read_rows(path))


LINES = '{"a": "1"}\n\n{"a": "ü"}\n'
LISTED = '[{"a": "1"},\n\n {"a": "ü"}]'
CSV = 'a\n1\n\n"ü"\n'
PLACES = {"lines": ["Line 1", "Line 3"], "listed": ["Row 1", "Row 2"], "csv": ["Line 2", "Line 4"]}


@pytest.mark.parametrize("packed", ["", ".gz", ".GZ"])
@pytest.mark.parametrize(
    ("ending", "content", "kind"),
    [
        (".jsonl", LINES, "lines"),
        (".JSONL", LINES, "lines"),
        (".ndjson", LINES, "lines"),
        (".json", LINES, "lines"),
        (".json", LISTED, "listed"),
        (".jsonl", LISTED, "listed"),
        (".csv", CSV, "csv"),
        (".Csv", CSV.replace("\n", "\r\n"), "csv"),
        (".csv", "\ufeff" + CSV, "csv"),
    ],
)
def test_text_of_any_kind_packed_or_not(ending, content, kind, packed, tmp_path):
    path = tmp_path / f"rows{ending}{packed}"
    assert is_data_file(path)
    assert rows_of(path, content) == [
        (f"{place} of {path}", {"a": value}) for place, value in zip(PLACES[kind], "1ü", strict=True)
    ]


@pytest.mark.parametrize("name", ["a.txt", "a.gz", "a.parquet.gz", "a.jsonl.zst", "a", "openai/gsm8k"])
def test_other_endings(name):
    assert not is_data_file(Path(name))


def test_rows_of_several_lines_stand_where_they_begin(tmp_path):
    rows = rows_of(tmp_path / "a.csv", 'a,b\n"x\ny\nz",1\n"x\r\ny",2\nx,3\n')
    assert [place.split(" of ")[0] for place, _ in rows] == ["Line 2", "Line 5", "Line 7"]


def test_long_fields_of_csv_are_read(tmp_path):
    """Python's own limit of 131,072 characters made a long problem "not CSV"."""
    assert rows_of(tmp_path / "a.csv", f"a\n{'x' * 200_000}\n")[0][1] == {"a": "x" * 200_000}


DIGITS = "9" * 5000


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.jsonl", f'{{"a": 1}}\n{{"a": {DIGITS}}}', ["Line 2 of", "too long a number", "5000 digits", "quotes"]),
        ("a.json", f'[{{"a": 1}},\n{{"a": 2}},\n{{"a": {DIGITS}}}]', ["Line 3 of", "too long a number"]),
        ("a.jsonl", '{"a": 1}\n{"a": ' + "[" * 5000, ["Line 2 of", "nested too deeply"]),
        ("a.jsonl", '{"a": 1}\n{"b": 1, "a": 1, "b": 2}', ["Line 2 of", "a field twice", "got: b"]),
        ("a.json", '[{"a": {"b": 1, "b": 2}}]', ["An object of", "a field twice", "got: b"]),
        ("a.csv", "a,b,a\n1,2,3\n", ["a.csv has two fields of one name", "a, b, a"]),
        ("a.csv", "a,b\n1,2\n\n1\n", ["Line 4 of", "number of fields", "a, b"]),
        ("a.csv", 'a\n1\n"x', ["Line 3 of", "not CSV"]),
        ("a.jsonl", "caf\xe9".encode("latin1"), ["not UTF-8"]),
    ],
)
def test_what_can_not_be_read_names_file_and_line(name, content, parts, tmp_path):
    with pytest.raises(UserError) as error:
        rows_of(tmp_path / name, content)
    assert str(tmp_path / name) in str(error.value)
    assert all(part in str(error.value) for part in parts), error.value


def test_two_columns_of_one_name_in_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table([pa.array([1]), pa.array([2])], names=["a", "a"]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="two fields of one name"):
        list(read_rows(tmp_path / "a.parquet"))


@pytest.mark.parametrize("cut", [0.5, 0.95])
def test_a_download_that_broke_off(cut, tmp_path):
    whole = gzip.compress("".join(json.dumps({"a": i * 7919 % 1000}) + "\n" for i in range(200)).encode())
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(whole[: int(len(whole) * cut)])
    with pytest.raises(UserError, match="not a whole gzip file"):
        list(read_rows(path))


@pytest.mark.parametrize(
    ("split", "left"),
    [("train", "01234"), ("train[:-2]", "012"), ("train[-2:]", "34"), ("[1:3]", "12"), ("test[:9]", "01234")],
)
def test_some_rows_of_a_file(split, left, tmp_path):
    """As `datasets` takes them of a data set on the hub; the places stay those in the file."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"question": str(n), "answer": "1"}) + "\n" for n in range(5)))
    problems = read_problems(Source(str(path), split=split))
    assert [p.text for p in problems] == list(left)
    assert [p.text for p in read_problems(Source(str(path), split=split, limit=1))] == [left[0]]
