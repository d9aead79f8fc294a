"""Answers to a few held-out problems through a run: ``held_out.jsonl``, and how they are shown."""

import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlif_lightning.runs import markdown
from rlif_lightning.runs.folder import HELD_OUT

MARKS = {True: "✓", False: "✗", None: " "}
COLUMNS = 4  # evaluations that a table shows
COLOURS = {True: "\033[32m", False: "\033[31m"}  # green, red


def load_held_out(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """Step to the rows of an evaluation, in their order; lines that are damaged or cut short are left out.

    A row has ``step``, ``problem``, ``completion``, and, where the problem has an answer, ``gold`` and ``correct``.
    """
    found: dict[int, list[dict[str, Any]]] = {}
    path = Path(folder) / HELD_OUT
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
            mark(row), (row["problem"] + row["completion"]).encode()  # texts that can be shown
            found.setdefault(int(row["step"]), []).append(row)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            continue
    return dict(sorted(found.items()))


def mark(row: Mapping[str, Any]) -> str:
    """Right, wrong, or nothing where the problem has no answer."""
    return MARKS[row.get("correct")]


def beginning(text: str, most: int) -> str:
    """A text on one line, its end left out."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 3]}..."


def ending(text: str, most: int) -> str:
    """A text on one line, its beginning left out: answers stand at the end."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"...{text[len(text) - most + 3 :]}"


def answers_table(held_out: Mapping[int, list[dict[str, Any]]]) -> str:
    """The answers to the problems of the last evaluation, at the first, the last, and some between, as Markdown."""
    steps = list(held_out)
    shown = list(dict.fromkeys(steps[n * (len(steps) - 1) // (COLUMNS - 1)] for n in range(COLUMNS)))
    rows = []
    for problem, gold in {row["problem"]: row.get("gold", "") for row in held_out[steps[-1]]}.items():
        answers = [next((row for row in held_out[step] if row["problem"] == problem), None) for step in shown]
        cells = [f"{markdown.MARKS[a.get('correct')]} {ending(a['completion'], 200)}" if a else "" for a in answers]
        rows.append([ending(problem, 200), gold, *cells])
    return markdown.table(["problem", "right answer", *(f"step {step}" for step in shown)], rows)


def answer_line(row: Mapping[str, Any]) -> str:
    """A problem, what the policy answers and whether that is right, in one line of the terminal.

    The caller must escape what the row holds. In colour on a terminal, unless NO_COLOR is set.
    """
    width = (shutil.get_terminal_size().columns or 80) if sys.stderr.isatty() else 100
    head = f"step {row['step']:>4}  {mark(row)}  {beginning(row['problem'], width // 3)} -> "
    line = head + ending(row["completion"], max(width - len(head) - 1, 10))
    coloured = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    return f"{COLOURS[row['correct']]}{line}\033[0m" if coloured and row.get("correct") in COLOURS else line
