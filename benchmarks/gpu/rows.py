"""A row of the day: what was checked or measured, and what was asked for; the page that holds all rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

BEGIN, END = "<!-- gpu -->", "<!-- /gpu -->"
Verdict = Literal["passed", "MISSED", "measured", "not run", "failed"]


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Args:
        name: What was checked.
        value: What came out, with its unit; for ``not run`` and ``failed`` the reason.
        asked: The tolerance, in words.
        verdict: ``measured`` where nothing is asked for.
    """

    name: str
    value: str
    asked: str = ""
    verdict: Verdict = "measured"


def judged(name: str, value: str, asked: str, good: bool) -> Row:
    """A row with a tolerance."""
    return Row(name, value, asked, "passed" if good else "MISSED")


def page(done: dict[str, dict[str, Any]], parts: dict[str, Sequence[str]]) -> str:
    """All parts as Markdown, from what ``results.read`` gives.

    Args:
        done: Part/check to ``rows``, ``seconds`` and ``setting``.
        parts: Each part's checks; those that are not done yet are said so.
    """
    text: list[str] = []
    settings: dict[str, None] = {}  # in their order, each once
    for part, checks in parts.items():
        found = {name: done[f"{part}/{name}"] for name in checks if f"{part}/{name}" in done}
        text += [f"### {part}", ""]
        if found:
            text += ["| what | came out | asked for | verdict |", "|---|---|---|---|"]
        for record in found.values():
            text += [line(Row(**row)) for row in record["rows"]]
            settings[describe(record["setting"])] = None
        if missing := [name for name in checks if name not in found]:
            text += ["", f"Not run yet: {', '.join(missing)}."]
        elif seconds := sum(record["seconds"] for record in found.values()):
            text += ["", f"In {seconds:,.0f} s."]
        text += [""]
    counts = count(done)
    return "\n".join([", ".join(f"{n} {verdict}" for verdict, n in counts.items()), "", *text, *settings]) + "\n"


def count(done: dict[str, dict[str, Any]]) -> dict[str, int]:
    """Rows by verdict."""
    verdicts = [row["verdict"] for record in done.values() for row in record["rows"]]
    return {verdict: verdicts.count(verdict) for verdict in dict.fromkeys(verdicts)}


def line(row: Row) -> str:
    """As a line of a table; messages of others may hold anything."""
    cells = [" ".join(cell.replace("|", "\\|").replace("<", "&lt;").split()) for cell in (row.value, row.asked)]
    return f"| {row.name} | {cells[0]} | {cells[1]} | {row.verdict} |"


def describe(setting: dict[str, Any]) -> str:
    """Device, date, versions, commit, command."""
    versions = ", ".join(f"{name} {number}" for name, number in setting["versions"].items())
    return f"- {setting['device']}; {setting['date']}; {versions}; commit {setting['commit']}; `{setting['command']}`"
