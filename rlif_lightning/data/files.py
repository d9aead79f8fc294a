"""Rows of local data files.

Read here, not with `datasets`, which would copy local files into its cache in the user's home, and would not name
the line that is broken.
"""

import csv
import gzip
import json
import re
import sys
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, TextIO, cast

from rlif_lightning.errors import UserError

Rows = Iterator[tuple[str, dict[str, Any]]]  # each with its place, such as "Line 7 of problems.jsonl"


def is_data_file(path: Path) -> bool:
    """Whether a name ends as those of data files do."""
    return _ending(path) in READERS


def read_rows(path: Path) -> Rows:
    """The rows of a data file: of a text with their lines, of others with their numbers, from 1 on."""
    if not path.is_file():
        wrong = "is a folder" if path.is_dir() else "is no ordinary file" if path.exists() else "does not exist"
        raise UserError(f"The data file {wrong}", got=path, do="check data.*.path")
    try:
        yield from READERS[_ending(path)](path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text", got=error, do="save it as UTF-8") from error
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path} is not a whole gzip file", got=error, do="copy it again") from error


def _ending(path: Path) -> str:
    name = path.name.lower()
    text = name.removesuffix(".gz")
    return Path(name if text.endswith(".parquet") else text).suffix


def _open(path: Path, newline: str | None = None) -> TextIO:
    opened = gzip.open if path.name.lower().endswith(".gz") else open
    return cast(TextIO, opened(path, "rt", encoding="utf-8-sig", newline=newline))


def _json(path: Path) -> Rows:
    """A list of objects, or one object per line, whatever the ending."""
    with _open(path) as file:
        listed = file.read(100).lstrip().startswith("[")
        file.seek(0)
        for number, text in enumerate(map(str.rstrip, [file.read()] if listed else file), 1):
            if not text:
                continue
            try:
                found = json.loads(text, object_pairs_hook=_object)
            except (ValueError, RecursionError) as error:
                raise _not_json(error, text, number, path) from error
            for place, row in enumerate(found if listed else [found], number):
                where = f"{'Row' if listed else 'Line'} {place} of {path}"
                if not isinstance(row, dict):
                    got, expected = json.dumps(row)[:80], '{"field": ...}'
                    raise UserError(f"{where} is not a JSON object", got=got, expected=expected)
                yield where, row


class _Twice(ValueError):
    """A field that stands twice in an object."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Twice(next(name for name in names if names.count(name) > 1))
    return found


def _not_json(error: Exception, text: str, number: int, path: Path) -> UserError:
    """What is wrong with a text that begins at a line, and that Python can't read."""
    if isinstance(error, json.JSONDecodeError):
        place = f"Line {number + error.lineno - 1} of {path}"
        got = text.split("\n")[error.lineno - 1].strip()[:80]
        expected = f"a list of objects, or an object per line ({error.msg} at column {error.colno})"
        return UserError(f"{place} is not JSON", got=got, expected=expected)
    if isinstance(error, _Twice):
        place = f"An object of {path}" if text.startswith("[") else f"Line {number} of {path}"
        return UserError(f"{place} has a field twice", got=error, do="give each a name of its own")
    digits = re.search(rf"\d{{{sys.get_int_max_str_digits() + 1},}}", text)
    place = f"Line {number + text.count(chr(10), 0, digits.start() if digits else 0)} of {path}"
    if digits is None:
        return UserError(f"{place} is nested too deeply")
    return UserError(f"{place} holds too long a number", got=f"{len(digits[0])} digits", do="write it in quotes")


def _csv(path: Path) -> Rows:
    """Rows below a line of field names; every value is text."""
    csv.field_size_limit(2**31 - 1)
    with _open(path, newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            names = _each_once(next(reader, []), path)
            line = reader.line_num + 1  # where the next row begins, which may have several
            for values in reader:
                place, line = f"Line {line} of {path}", reader.line_num + 1
                if values and len(values) != len(names):
                    expected = ", ".join(names)
                    raise UserError(
                        f"{place} has a different number of fields from the first line", expected=expected
                    )
                if values:
                    yield place, dict(zip(names, values, strict=True))
        except csv.Error as error:
            raise UserError(f"Line {reader.line_num} of {path} is not CSV", got=error) from error


def _parquet(path: Path) -> Rows:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _each_once(file.schema_arrow.names, path)
            rows = chain.from_iterable(batch.to_pylist() for batch in file.iter_batches())
            yield from ((f"Row {number} of {path}", row) for number, row in enumerate(rows, 1))
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a Parquet file", got=error) from error


def _each_once(names: list[str], path: Path) -> list[str]:
    if len(set(names)) < len(names):
        raise UserError(f"{path} has two fields of one name", got=", ".join(names), do="give each a name of its own")
    return names


READERS = {".jsonl": _json, ".ndjson": _json, ".json": _json, ".csv": _csv, ".parquet": _parquet}
