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
    """The rows of a file with an ending of ``READERS``.

    Raises:
        UserError: There is no such file, or a line of it is wrong.
    """
    if not path.is_file():
        raise UserError("The data file does not exist", got=path, do="check data.*.path")
    try:
        yield from READERS[path.suffix](path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text", got=error, do="save it as UTF-8") from error


def _jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"Line {number} of {path} is not JSON",
                    got=line.strip()[:80],
                    expected=f"one JSON object per line ({error.msg} at column {error.colno})",
                ) from error
            yield _object(row, f"Line {number} of {path}")


def _json(path: Path) -> Iterator[dict[str, Any]]:
    """A list of objects, or objects one per line under this ending."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _jsonl(path)
            return
        raise UserError(
            f"Line {error.lineno} of {path} is not JSON", got=f"{error.msg} at column {error.colno}"
        ) from error
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
        yield _object(row, f"Row {number} of {path}")


def _object(row: Any, place: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{place} is no JSON object", got=json.dumps(row)[:80], expected='{"field": ...}')
    return row


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


READERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
