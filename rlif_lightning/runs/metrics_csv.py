"""metrics.csv: one row per optimiser step; a kill or a resume leaves a correct table.

The first column is ``step``, the others are metric names in order of first appearance. An empty cell was not
logged; numbers read back exactly, nan and inf included. Lightning's CSVLogger deletes the file of a resumed run.
"""

import csv
import io
import os
from collections.abc import Mapping
from pathlib import Path

from rlif_lightning.errors import UserError, writing
from rlif_lightning.runs.atomic import replacing

STEP = "step"

Row = dict[str, str]
Curves = dict[str, dict[int, float]]


class MetricsCSV:
    """Appends to one metrics.csv, which appears with the first logged value; an existing file is continued.

    Only the last row is rewritten in place, in one write. A new column, or a value for an earlier row, replaces the
    whole file at once.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._columns, rows = _read(self.path)
        self._last: Row = rows[-1] if rows else {}
        if self.path.exists():
            _write(self.path, self._columns, rows)  # without a line that a kill has cut short

    @property
    def last_step(self) -> int | None:
        """The step of the last row, None in an empty table."""
        return int(self._last[STEP]) if self._last else None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add values to the row of a step; the later value of a metric wins.

        The step may lie before the last row: Lightning logs a user's own metrics after the next step's evaluation.
        """
        if not values:
            return
        cells = {name: repr(float(value)) for name, value in values.items()}
        if STEP in cells:
            raise ValueError(f"{STEP!r} is the table's first column and cannot be a metric")
        new = [name for name in cells if name not in self._columns]
        if new or (self.last_step is not None and step < self.last_step):
            rows = {int(row[STEP]): row for row in _read(self.path)[1]}
            rows.setdefault(int(step), {STEP: str(int(step))}).update(cells)
            self._columns += new
            self._last = rows[max(rows)]
            _write(self.path, self._columns, [rows[n] for n in sorted(rows)])
            return
        old = self._last if step == self.last_step else {}
        row = {STEP: str(int(step)), **old, **cells}
        with writing(self.path), self.path.open("r+b") as file:
            file.seek(-len(_lines(self._columns, [old])) if old else 0, os.SEEK_END)
            # Overwritten first and cut afterwards: cutting first would lose the row to a kill in between.
            # What a kill may leave behind the row is the tail of its old text, which has too few cells.
            file.write(_lines(self._columns, [row]))
            file.truncate()
        self._last = row

    @staticmethod
    def truncate(path: Path, step: int) -> None:
        """Cut a table back to a checkpoint that was taken after ``step`` optimiser steps.

        Rows before ``step`` stay. Rows that a continued run logs again go, and so do columns that become empty, so
        that the file ends up like that of an uninterrupted run. A missing file stays missing.
        """
        if not Path(path).exists():
            return
        columns, rows = _read(path)
        kept = [row for row in rows if int(row[STEP]) < step]
        used = {STEP}.union(*kept)
        _write(path, [name for name in columns if name in used], kept)


def read_metrics(path: Path) -> Curves:
    """Read a metrics.csv as ``{metric: {step: value}}``, without a last line that a kill has cut short."""
    columns, rows = _read(Path(path))
    return {name: {int(row[STEP]): float(row[name]) for row in rows if name in row} for name in columns[1:]}


def _read(path: Path) -> tuple[list[str], list[Row]]:
    """The columns and the rows (logged cells only) of a table, an empty one for a missing file.

    A power cut may leave nothing of a file but its length.
    """
    content = path.read_bytes() if path.exists() else b""
    if not content.strip(b"\0"):
        return [STEP], []
    lines = content.decode("utf-8", "replace").split("\n")
    table = [next(csv.reader([line]), []) for line in lines[:-1]]  # a line without its end is not whole
    columns = table[0] if table else []
    rows: list[Row] = []
    for number, cells in enumerate(table or [[]]):
        if number > 0 and len(cells) == len(columns) and _are_numbers(cells):
            rows.append({name: cell for name, cell in zip(columns, cells, strict=True) if cell})
        elif columns[:1] != [STEP] or 0 < number < len(table) - 1:
            raise UserError(
                f"{path} is not a table of metrics: line {number + 1} does not fit.",
                got=lines[number][:80],
                expected=f"a header that begins with {STEP!r}, then one row of numbers per optimiser step",
                do="mend or remove that line, or name another run folder",
            )
    return columns, rows


def _are_numbers(cells: list[str]) -> bool:
    try:
        return 0 <= int(cells[0]) < 2**53 and bool([cells, *(float(cell) for cell in cells[1:] if cell)])
    except ValueError:
        return False


def _write(path: Path, columns: list[str], rows: list[Row]) -> None:
    """Replace a table at once."""
    with replacing(path) as file:
        file.write(_lines(columns, [dict(zip(columns, columns, strict=True)), *rows]))


def _lines(columns: list[str], rows: list[Row]) -> bytes:
    text = io.StringIO()
    csv.DictWriter(text, columns, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()
