"""Problems of a data set: files, hub names and the embedded toy, with a declarative mapping of their fields."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from rlif_lightning.data.files import READERS, read_rows
from rlif_lightning.errors import UserError
from rlif_lightning.grading import AnswerFormat, Gold, check_where, read_gold
from rlif_lightning.grading.choices import lettered, right_letter
from rlif_lightning.models.hub import from_hub, is_local
from rlif_lightning.toy import parse_toy_name, refuse_almost_toy, toy_problems

TOY_TRAIN, TOY_HELD_OUT = 8192, 1000
_FIELD = re.compile(r"\{([A-Za-z_]\w*)\}")


@dataclass
class Source:
    r"""Where problems come from, and which fields hold what.

    Args:
        path: A .jsonl, .json, .csv or .parquet file, ``toy``, or the name of a data set on the hub.
        prompt: Field that holds the problem's text, or a text with fields in braces:
            ``"{code}\nassert f({input}) == ??"``.
        answer: Field that holds the reference answer; null: the data have no answers, and nothing that needs labels
            is computed.
        gold: Place of the answer in that field: ``whole``, ``boxed``, ``last_number``, or a regular expression with
            one group, such as ``'####\s*(.+)'``.
        options: Field that holds a list of choices. They are shown as lines ``A. first``, ``B. second`` below the
            problem, or where the prompt names the field in braces; the answer is then one of these letters.
        by: Field or list of fields by whose values results are also reported, such as a subject or a level.
        unit: Field that holds the answer's unit, which a completion may write or leave out.
        tolerance: Field that holds the absolute error that an answer may have.
        subset: Configuration of a data set on the hub.
        split: Split of a data set on the hub.
        limit: Number of rows to take, from the first on; null: all.
        answers: How answers to these problems are read and compared; null: as ``data.answers`` says.
    """

    path: str
    prompt: str = "question"
    answer: str | None = "answer"
    gold: str = "whole"
    unit: str | None = None
    tolerance: str | None = None
    options: str | None = None
    by: str | list[str] | None = None
    subset: str | None = None
    split: str = "train"
    limit: int | None = None
    answers: AnswerFormat | None = None

    def __post_init__(self) -> None:
        """Check the answer's place before any file is read."""
        if not isinstance(self.gold, str):
            raise UserError(
                "data.*.gold is not a text",
                got=repr(self.gold),
                do="on the command line write [#] for a leading #, which YAML takes for a comment; or use a file",
            )
        check_where(self.gold)
        if self.limit is not None and self.limit < 1:
            raise UserError("data.*.limit is too small", got=self.limit, expected="1 or more, or null for all rows")


@dataclass(frozen=True)
class Problem:
    """One row: its text and, where the data has one, its reference answer."""

    text: str
    gold: Gold | None
    by: dict[str, str] = field(default_factory=dict)  # the fields by which results are given apart


def read_problems(source: Source, held_out: bool = False) -> list[Problem]:
    """Read every problem of a source; of the toy, which has no files for them, those held out or the others.

    Raises:
        UserError: A missing or empty file, wrong JSON (with its line), a missing field.
    """
    rows = islice(_rows(source, held_out), source.limit)
    problems = [_problem(source, f"Row {number} of {source.path}", row) for number, row in enumerate(rows, 1)]
    if not problems:
        raise UserError("The data set is empty", got=source.path, expected="at least one row")
    return problems


def _problem(source: Source, place: str, row: dict[str, Any]) -> Problem:
    def field(setting: str, name: str | None = None) -> Any:
        """What the row has in the field that a setting names; None where it names none."""
        name = name or getattr(source, setting)
        if name is None:
            return None
        if name not in row:
            without = ", or set it to null where the data has no answers" if setting == "answer" else ""
            raise UserError(
                f"{place} has no field '{name}'",
                got=f"fields {', '.join(row) or 'none'}",
                do=f"name the right one in data.*.{setting}{without}",
            )
        return row[name]

    options = field("options")
    text = _text(source, field, None if options is None else lettered(options, place), place)
    groups = [source.by] if isinstance(source.by, str) else source.by or []
    by = {name: _label(name, field("by", name), place) for name in groups}
    value = field("answer")
    if source.answer is None:
        return Problem(text, None, by)
    if options is not None:
        return Problem(text, Gold(right_letter(value, len(options), place)), by)
    gold = read_gold(value, source.gold, field("unit"), field("tolerance"))
    if gold is None:
        raise UserError(
            f"{place} has no answer in '{source.answer}' at '{source.gold}'",
            got=repr(value)[-80:],
            do="set data.*.gold to where the answer stands",
        )
    return Problem(text, gold, by)


def _text(source: Source, field: Callable[..., Any], choices: str | None, place: str) -> str:
    """The problem as the policy is told it, with the choices where there are any."""

    def inserted(match: re.Match[str]) -> str:
        name = match[1]
        value = choices if name == source.options else field("prompt", name)
        if not isinstance(value, str | int | float):
            raise UserError(f"{place} has no text in '{name}'", got=repr(value)[:80])
        return str(value)

    # In one pass: problems are full of braces.
    text = _FIELD.sub(inserted, source.prompt) if _FIELD.search(source.prompt) else field("prompt")
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{place} has no text in '{source.prompt}'", got=repr(text)[:80])
    if choices is not None and f"{{{source.options}}}" not in source.prompt:
        text = f"{text}\n\n{choices}"
    if text.encode("utf-8", "replace").decode() != text:
        raise UserError(f"{place} holds half a character", got=ascii(text)[:80])
    return text


def _label(name: str, value: Any, place: str) -> str:
    if not isinstance(value, str | int | float | None):
        raise UserError(
            f"{place} has nothing in '{name}' that results could be given by",
            got=repr(value)[:80],
            expected="a text or a number",
            do="name another field in data.*.by",
        )
    return "null" if value is None else str(value)


def _rows(source: Source, held_out: bool) -> Iterable[dict[str, Any]]:
    path = Path(source.path).expanduser()
    if parse_toy_name(source.path) is not None:
        return toy_problems("held_out", TOY_HELD_OUT) if held_out else toy_problems("train", TOY_TRAIN)
    if path.suffix in READERS:
        return read_rows(path)
    if is_local(source.path):
        raise UserError("The data file has no known ending", got=source.path, expected=", ".join(READERS))
    import datasets

    refuse_almost_toy(source.path)
    load = partial(datasets.load_dataset, source.path, source.subset, split=source.split)
    rows: Iterable[dict[str, Any]] = from_hub("data set", source.path, load)
    return rows
