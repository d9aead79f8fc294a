"""Tables in Markdown whose cells show any text as it is."""

import re
from collections.abc import Iterable, Sequence

from rlif_lightning.errors import escaped

MARKS = {True: "✅", False: "❌", None: ""}  # coloured by themselves: cells have no colour


def plain(text: str) -> str:
    """A text that any program can store and show: control characters and lone surrogates are shown by number."""
    return escaped(text).encode("utf-8", "backslashreplace").decode()


def cell(text: object) -> str:
    """A text as a cell: what Markdown or HTML might take for their own becomes a character reference."""
    line = plain(" ".join(str(text).split()))
    return re.sub(r"[!-/:-@\[-`{-~]", lambda found: f"&#{ord(found[0])};", line)  # ASCII's punctuation


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; what goes into it is escaped, its head included."""
    lines = [list(map(cell, head)), ["---"] * len(head), *(list(map(cell, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
