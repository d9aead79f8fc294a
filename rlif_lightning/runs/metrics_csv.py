"""metrics.csv: one row per optimiser step; a kill or a resume leaves a correct table.

The first column is ``step``, the others are metric names in order of first appearance. An empty cell was not
logged; numbers read back exactly, nan and inf included. Lightning's CSVLogger deletes the file of a resumed run.
"""

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlif_lightning.errors import UserError
from rlif_lightning.runs.atomic import replacing

STEP = "step"

Row = dict[str, str]
Curves = dict[str, dict[int, float]]


class MetricsCSV:
    """Appends to one metrics.csv; an existing file is continued.

    Only the last row is rewritten in place, in one write. A new column, or a value for an earlier row, replaces the
    whole file at once.

    Args:
        path: The file; it appears with the first logged value.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._columns, rows = _read(self.path)
        self._last: Row = rows[-1] if rows else {}
        self._offset = 0  # where the last row begins
        if self.path.exists():
            self._replace(rows)  # also removes a line that a kill has cut short

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
            self._replace([rows[n] for n in sorted(rows)])
            return
        same = step == self.last_step
        row = {**(self._last if same else {STEP: str(int(step))}), **cells}
        line = _line([row.get(name, "") for name in self._columns])
        with self.path.open("r+b") as file:
            start = self._offset if same else file.seek(0, os.SEEK_END)
            file.seek(start)
            # Overwritten first and cut afterwards: cutting first would lose the row to a kill in between.
            # What a kill may leave behind the row is the tail of its old text, which has too few cells.
            file.write(line)
            file.truncate()
        self._last, self._offset = row, start

    def _replace(self, rows: list[Row]) -> None:
        self._offset = _write(self.path, self._columns, rows)

    @staticmethod
    def truncate(path: Path, step: int) -> None:
        """Cut a table back to a checkpoint that was taken after ``step`` optimiser steps.

        Rows before ``step`` stay. Rows that a continued run logs again go, and so do columns that become empty, so
        that the file ends up like that of an uninterrupted run. A missing file stays missing.
        """
        path = Path(path)
        if not path.exists():
            return
        columns, rows = _read(path)
        kept = [row for row in rows if int(row[STEP]) < step]
        used = {name for row in kept for name in row}
        _write(path, [name for name in columns if name in used or name == STEP], kept)


def read_metrics(path: Path) -> Curves:
    """Read a metrics.csv as ``{metric: {step: value}}`` with the logged values only.

    A last line that a kill has cut short is left out, so the table of a live run can be read.

    Raises:
        UserError: The file is no metrics table.
    """
    columns, rows = _read(Path(path))
    curves: Curves = {name: {} for name in columns[1:]}
    for row in rows:
        for name, cell in row.items():
            if name != STEP:
                curves[name][int(row[STEP])] = float(cell)
    return curves


def _read(path: Path) -> tuple[list[str], list[Row]]:
    """Return the columns and the rows (logged cells only) of a table, an empty one for a missing file."""
    if not path.exists():
        return [STEP], []
    *lines, tail = path.read_bytes().split(b"\n")
    table = [next(csv.reader([line.decode("utf-8", "replace")]), []) for line in lines]
    if not table or table[0][:1] != [STEP]:
        raise _damaged_line(path, 1, tail if not lines else lines[0])
    columns = table[0]
    rows: list[Row] = []
    for number, cells in enumerate(table[1:], start=2):
        if len(cells) == len(columns) and _are_numbers(cells):
            rows.append({name: cell for name, cell in zip(columns, cells, strict=True) if cell})
        elif number < len(table):
            raise _damaged_line(path, number, lines[number - 1])
    return columns, rows


def _are_numbers(cells: Sequence[str]) -> bool:
    try:
        int(cells[0])
        [float(cell) for cell in cells[1:] if cell]
    except ValueError:
        return False
    return True


def _damaged_line(path: Path, number: int, line: bytes) -> UserError:
    return UserError(
        f"{path} is not a table of metrics: line {number} does not fit.",
        got=line[:80].decode("utf-8", "replace"),
        expected=f"a header that begins with {STEP!r}, then one row of numbers per optimiser step",
        do="mend or remove that line, or name another run folder",
    )


def _write(path: Path, columns: Sequence[str], rows: Sequence[Row]) -> int:
    """Replace a table at once and return the offset of its last row."""
    lines = [_line(columns), *(_line([row.get(name, "") for name in columns]) for row in rows)]
    with replacing(path) as file:
        file.write(b"".join(lines))
    return sum(map(len, lines[:-1]))


def _line(cells: Sequence[str]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()
