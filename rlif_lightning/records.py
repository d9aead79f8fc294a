"""Rows of a data set: files, hub names and the embedded toy, with a declarative mapping of their fields."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlif_lightning.errors import UserError
from rlif_lightning.grading import Gold, check_where, read_gold
from rlif_lightning.hub import from_hub, is_local

TOY_TRAIN, TOY_HELD_OUT = 8192, 1000


@dataclass
class Source:
    r"""Where problems come from and which fields hold what.

    Args:
        path: A .jsonl, .json, .csv or .parquet file, ``toy``, or a data set's name on the Hugging Face hub.
        prompt: Field of the problem's text.
        answer: Field of the reference answer; null: the data has no answers and nothing label-based is computed.
        gold: Where in that field the answer stands: ``whole``, ``boxed``, ``last_number``, or a regular
            expression with one group, such as ``'####\s*(.+)'``.
        unit: Field of the answer's unit, which a completion may write or leave out.
        tolerance: Field of the absolute error that an answer may have.
        subset: Configuration of a hub data set.
        split: Split of a hub data set.
        limit: Take the first rows only.
    """

    path: str
    prompt: str = "question"
    answer: str | None = "answer"
    gold: str = "whole"
    unit: str | None = None
    tolerance: str | None = None
    subset: str | None = None
    split: str = "train"
    limit: int | None = None

    def __post_init__(self) -> None:
        """Check the answer's place before any file is read."""
        if not isinstance(self.gold, str):
            raise UserError(
                "data.*.gold is no text",
                got=repr(self.gold),
                do="on the command line write [#] for a leading #, which YAML takes for a comment; or use a file",
            )
        check_where(self.gold)


@dataclass(frozen=True)
class Problem:
    """One row: its text and, where the data has one, its reference answer."""

    text: str
    gold: Gold | None


def read_problems(source: Source, held_out: bool = False) -> list[Problem]:
    """Read every problem of a source.

    Args:
        source: The source.
        held_out: Which part of the toy's problems; other sources name their files.

    Raises:
        UserError: A missing or empty file, wrong JSON (with its line), a missing field.
    """
    problems = []
    for number, row in enumerate(_rows(source, held_out), 1):
        if source.limit is not None and number > source.limit:
            break
        problems.append(_problem(source, number, row))
    if not problems:
        raise UserError("The data set is empty", got=source.path, expected="at least one row")
    return problems


def _problem(source: Source, number: int, row: dict[str, Any]) -> Problem:
    def field(name: str, key: str) -> Any:
        if name not in row:
            raise UserError(
                f"Row {number} of {source.path} has no field '{name}'",
                got=f"fields {', '.join(row) or 'none'}",
                do=f"name the right one in data.*.{key}"
                + (", or set it to null where the data has no answers" if key == "answer" else ""),
            )
        return row[name]

    text = field(source.prompt, "prompt")
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"Row {number} of {source.path} has no text in '{source.prompt}'", got=repr(text)[:80])
    if source.answer is None:
        return Problem(text, None)
    value = field(source.answer, "answer")
    unit = field(source.unit, "unit") if source.unit else None
    tolerance = field(source.tolerance, "tolerance") if source.tolerance else None
    gold = read_gold(value, source.gold, unit, tolerance)
    if gold is None:
        raise UserError(
            f"Row {number} of {source.path} has no answer in '{source.answer}' at '{source.gold}'",
            got=repr(value)[-80:],
            do="set data.*.gold to where the answer stands",
        )
    return Problem(text, gold)


def _rows(source: Source, held_out: bool) -> Iterator[dict[str, Any]]:
    from rlif_lightning.toy import parse_toy_name, toy_problems

    if parse_toy_name(source.path) is not None:
        yield from toy_problems("held_out", TOY_HELD_OUT) if held_out else toy_problems("train", TOY_TRAIN)
        return
    path = Path(source.path).expanduser()
    if path.suffix == ".jsonl":
        yield from _jsonl(_existing(path))
        return
    import datasets

    kinds = {".json": "json", ".csv": "csv", ".parquet": "parquet"}
    if path.suffix in kinds:
        file = str(_existing(path))
        yield from from_hub(
            "data set",
            source.path,
            lambda: datasets.load_dataset(kinds[path.suffix], data_files=file, split="train"),
        )
        return
    if is_local(source.path):
        raise UserError(
            "The data file has no known ending", got=source.path, expected=".jsonl, .json, .csv or .parquet"
        )
    yield from from_hub(
        "data set", source.path, lambda: datasets.load_dataset(source.path, source.subset, split=source.split)
    )


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise UserError("The data file does not exist", got=path, do="check data.*.path")
    return path


def _jsonl(path: Path) -> Iterator[dict[str, Any]]:
    # Read here, not with `datasets`: a broken line is then named by its number.
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"Line {number} of {path} is not JSON", got=line.strip()[:80], expected=error.msg
                ) from error
            if not isinstance(row, dict):
                raise UserError(
                    f"Line {number} of {path} is no JSON object",
                    got=line.strip()[:80],
                    expected='{"field": ...}',
                )
            yield row
