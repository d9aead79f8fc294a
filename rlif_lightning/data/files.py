"""Rows of local data files.

Read here, not with `datasets`, which would copy local files into its cache in the user's home, and would not name
the line that is broken.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlif_lightning.errors import UserError


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file with an ending of ``READERS``."""
    if not path.is_file():
        raise UserError("The data file does not exist", got=path, do="check data.*.path")
    try:
        yield from READERS[path.suffix](path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text", got=error, do="save it as UTF-8") from error


def _json(path: Path) -> Iterator[dict[str, Any]]:
    """A list of objects, or one object per line, whatever the ending."""
    with path.open(encoding="utf-8-sig") as file:
        listed = file.read(100).lstrip().startswith("[")
        file.seek(0)
        for number, text in enumerate(map(str.rstrip, [file.read()] if listed else file), 1):
            if not text:
                continue
            try:
                found = json.loads(text)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"Line {number + error.lineno - 1} of {path} is not JSON",
                    got=text.split("\n")[error.lineno - 1].strip()[:80],
                    expected=f"a list of objects, or an object per line ({error.msg} at column {error.colno})",
                ) from error
            for place, row in enumerate(found if listed else [found], number):
                if not isinstance(row, dict):
                    where = f"{'Row' if listed else 'Line'} {place} of {path}"
                    got, expected = json.dumps(row)[:80], '{"field": ...}'
                    raise UserError(f"{where} is not a JSON object", got=got, expected=expected)
                yield row


def _csv(path: Path) -> Iterator[dict[str, Any]]:
    """Rows below a line of field names; every value is text."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, strict=True)
        try:
            for row in rows:
                if None in row or None in row.values():
                    raise UserError(
                        f"Line {rows.line_num} of {path} has another number of fields than the first line",
                        expected=", ".join(rows.fieldnames or []),
                    )
                yield row
        except csv.Error as error:
            raise UserError(f"Line {rows.line_num} of {path} is not CSV", got=error) from error


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a Parquet file", got=error) from error


READERS = {".jsonl": _json, ".json": _json, ".csv": _csv, ".parquet": _parquet}
