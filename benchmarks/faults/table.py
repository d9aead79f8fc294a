"""A harness: its options, the faults that it has injected as rows, and their table."""

import argparse
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from benchmarks import result
from benchmarks.faults import runs
from rlif_lightning.version import __version__

Case = TypeVar("Case")
SHORT = 8  # rows of a table that a page shows as a whole


@dataclass(frozen=True)
class Row:
    """One injected fault.

    Args:
        injected: The fault, in words.
        seen: What came of it.
        kept: Whether that is as promised; None: the fault could not be injected here.
    """

    injected: str
    seen: str
    kept: bool | None


@dataclass(frozen=True)
class Options:
    """What a harness is given.

    Args:
        n: Number of faults; None: all of a list.
        seed: Of what is drawn at random.
        tiny: Use an untrained toy and few steps, to see that everything runs.
    """

    n: int | None
    seed: int
    tiny: bool

    @property
    def fit(self) -> list[str]:
        """The command that faults are injected into: the toy, a dozen steps, everything on."""
        return ["fit", *runs.SMALL, *(runs.TINY if self.tiny else []), *self.model]

    @property
    def model(self) -> list[str]:
        """The setting of its model, where that is not the recipe's."""
        return [f"--model.name={runs.untrained()}"] if self.tiny else []

    def drawn(self, cases: Sequence[Case]) -> list[Case]:
        """So many of a list, in its order."""
        if self.n is None or self.n >= len(cases):
            return list(cases)
        rows = random.Random(self.seed).sample(range(len(cases)), self.n)
        return [cases[i] for i in sorted(rows)]


Harness = Callable[[Options], Iterator[Row]]


def run(harness: Harness, n: int | None = None, arguments: Sequence[str] | None = None) -> None:
    """The command of a harness: inject, print and write the table; exit 1 where a promise is broken."""
    name, doc = harness.__name__, sys.modules[harness.__module__].__doc__
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--n", type=int, default=n, help="number of faults; null: all of a list (default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--tiny", action="store_true", help="an untrained toy and few steps, to see that everything runs")
    add("--out", type=Path, default=Path("runs/faults"), help=f"runs and logs go to OUT/{name}, emptied before")
    add("--docs", type=Path, help=f"document with {begin} and {end} to put the table in")
    given = parser.parse_args(arguments)
    docs = given.docs and given.docs.absolute()
    measured = f"rlif-lightning {__version__} at {commit()}"
    enter(given.out / name)
    runs.preload(toy=not given.tiny)
    rows = []
    for row in harness(Options(given.n, given.seed, given.tiny)):
        print(line(row, 1), file=sys.stderr, flush=True)
        rows.append(row)
    words = f" --n {given.n}" * (given.n is not None) + " --tiny" * given.tiny
    command = f"python -m benchmarks.faults.{name}{words} --seed {given.seed}"
    conditions = f"{measured}, {result.conditions(result.setting(command, len(rows), 0))}"
    text = page(rows, command, conditions)
    print(text)
    if docs is not None:
        result.fill(docs, text, begin, end)
    sys.exit(any(row.kept is False for row in rows))


def commit() -> str:
    """The commit whose files are measured, by its short name."""
    root = Path(__file__).parent
    git = partial(subprocess.run, cwd=root, capture_output=True, text=True, check=False)
    name = git(["git", "rev-parse", "--short", "HEAD"]).stdout.strip() or "no commit"
    changed = git(
        ["git", "status", "--porcelain", ":/rlif_lightning", ":/callbacks", ":/configs", ":/benchmarks"]
    ).stdout
    return f"{name} with changes" if changed else name


def enter(folder: Path) -> None:
    """Go to an empty folder, offline and with one thread."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.chdir(folder)
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")


def page(rows: Sequence[Row], command: str, conditions: str) -> str:
    """Rows for a reader: how many are as promised, and the table; a long one is folded but for what is not kept."""
    wrong = [row for row in rows if not row.kept]
    every = f"{table(rows)}\n{conditions}\n"
    if len(rows) > SHORT:
        folded = f"<details><summary>All {len(rows)}</summary>\n\n{every}\n</details>\n"
        every = f"{table(wrong)}\n{folded}" if wrong else folded
    return f"**{verdict(rows)}**: `{command}`\n\n{every}"


def table(rows: Sequence[Row]) -> str:
    """Rows as Markdown; the same fault with the same outcome stands once."""
    lines = ["| injected | seen | times | promise |", "|---|---|---|---|"]
    return "\n".join([*lines, *(line(row, times) for row, times in Counter(rows).items())]) + "\n"


def line(row: Row, times: int) -> str:
    """One row of the table."""
    cells = [text.replace("|", "\\|").replace("\n", " ") for text in (row.injected, row.seen)]
    return f"| {cells[0]} | {cells[1]} | {times} | {word(row.kept)} |"


def word(kept: bool | None) -> str:
    """A promise in the table."""
    return "not tried" if kept is None else "kept" if kept else "**broken**"


def verdict(rows: Sequence[Row]) -> str:
    """How many of how many are as promised."""
    tried = [row for row in rows if row.kept is not None]
    left = f", {len(rows) - len(tried)} not tried" if len(tried) < len(rows) else ""
    return f"{sum(bool(row.kept) for row in tried)} of {len(tried)} as promised{left}"
