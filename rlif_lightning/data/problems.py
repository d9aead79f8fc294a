"""Problems of a data set: files, hub names and the embedded toy, with a declarative mapping of their fields."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info

from rlif_lightning.data.files import READERS, Rows, is_data_file, read_rows
from rlif_lightning.data.rows import Message, Row, is_empty
from rlif_lightning.errors import UserError
from rlif_lightning.grading import Gold, SourceAnswers, check_where, read_gold
from rlif_lightning.grading.choices import lettered, right_letter
from rlif_lightning.models.hub import from_hub, is_local
from rlif_lightning.toy import parse_toy_name, refuse_almost_toy, toy_problems

TOY_TRAIN, TOY_HELD_OUT = 8192, 1000
_FIELD = re.compile(r"\{([A-Za-z_]\w*(?:\.\w+)*)\}")
STANDING_IN = {"question": ("prompt", "problem"), "answer": ("reward_model.ground_truth", "ground_truth")}
"""Names by which other trainers' data sets (TRL's, verl's) call what the defaults name."""
NEEDLESS = {"train": "no reward needs answers", "predict": "nothing is to be graded"}


@dataclass
class Source:
    r"""Where problems come from, and which fields hold what.

    Args:
        path: A .jsonl, .json, .csv (also .gz) or .parquet file, ``toy``, or the name of a data set on the hub.
        prompt: Field that holds the problem's text or a conversation (a list of role and content), or a text with
            fields in braces: ``"{code}\nassert f({input}) == ??"``. Fields within others have dots and, in lists,
            numbers: ``extra_info.question``, ``messages.0.content``. A conversation may be written as JSON in a text.
            Where there is no ``question``, ``prompt`` or ``problem`` stands in for it.
        answer: Field that holds the reference answer; null: the data have no answers, and nothing that needs labels
            is computed. ``reward_model.ground_truth`` or ``ground_truth`` stands in for ``answer``.
        without_answer: What to do if rows have no answer: ``error``, or ``skip`` to leave them out and count them.
        gold: Place of the answer in that field: ``whole``, ``boxed``, ``last_number``, or a regular expression with
            one group, such as ``'####\s*(.+)'``.
        options: Field that holds a list of choices. They are shown as lines ``A. first``, ``B. second`` below the
            problem, or where the prompt names the field in braces; the answer is then one of these letters.
        by: Field or list of fields by whose values results are also reported, such as a subject or a level.
        unit: Field that holds the answer's unit, which a completion may write or leave out.
        tolerance: Field that holds the absolute error that an answer may have.
        subset: Configuration of a data set on the hub.
        split: Split of a data set on the hub, or some of its rows: ``train[:-500]`` leaves out the last 500,
            ``train[-500:]`` takes them. Of a file or the toy only the brackets count.
        limit: Number of rows to take, from the first on; null: all.
        answers: How answers to these problems are read and compared, where it differs from ``data.answers``.
    """

    path: str
    prompt: str = "question"
    answer: str | None = "answer"
    without_answer: Literal["error", "skip"] = "error"
    gold: str = "whole"
    unit: str | None = None
    tolerance: str | None = None
    options: str | None = None
    by: str | list[str] | None = None
    subset: str | None = None
    split: str = "train"
    limit: int | None = None
    answers: SourceAnswers | None = None

    def __post_init__(self) -> None:
        """Check the answer's place before any file is read."""
        for name, value in (("prompt", self.prompt), ("gold", self.gold)):
            if not isinstance(value, str):
                do = "put it into quotes: YAML takes what follows a # for a comment"
                raise UserError(f"data.*.{name} is not a text", got=repr(value), do=do)
        check_where(self.gold)
        if not self.path.strip():
            raise UserError(
                "data.*.path is empty", got=repr(self.path), expected=f"{', '.join(READERS)}, toy, or a name"
            )
        if self.limit is not None and self.limit < 1:
            raise UserError("data.*.limit is too small", got=self.limit, expected="1 or more, or null for all rows")


@dataclass(frozen=True)
class Problem:
    """One row: its text and, where the data has one, its reference answer."""

    text: str
    gold: Gold | None
    by: dict[str, str] = field(default_factory=dict)  # the fields by which results are given apart
    messages: Sequence[Message] = ()  # of a conversation, which the text only shows
    place: str = "A problem"  # for messages: "Line 7 of problems.jsonl"


def read_problems(source: Source, split: str = "train") -> list[Problem]:
    """Read every problem of a source, that of ``data.<split>``; the toy has problems to train on and others."""
    rows = (Row(*row) for row in islice(_rows(source, split), source.limit))
    first = next(rows, None)
    if first is None:
        got, do = f"{source.path}, split {source.split}", f"check the file and data.{split}.split"
        raise UserError("The data set is empty", got=got, expected="at least one row", do=do)
    source = _with_fields_of(source, first)
    problems: list[Problem] = []
    unanswered: list[Row] = []
    for row in chain([first], rows):
        problem = _problem(source, row)
        if problem.gold is None and source.answer is not None:
            unanswered.append(row)
        else:
            problems.append(problem)
    if unanswered:
        _leave_out(source, split, unanswered, len(problems))
    return problems


def _with_fields_of(source: Source, row: Row) -> Source:
    """A source with the names that its data set has for what the defaults name."""
    for setting in ("prompt", "answer"):
        name = getattr(source, setting)
        others = [other for other in STANDING_IN.get(name, ()) if row.has(other)]
        if others and not row.has(name):
            rank_zero_info(f"{source.path} has no field '{name}': '{others[0]}' stands in for it")
            changed: dict[str, Any] = {setting: others[0]}
            source = replace(source, **changed)
    return source


def _leave_out(source: Source, split: str, unanswered: list[Row], answered: int) -> None:
    """Count the rows without an answer, or refuse them, with what to do about them where they are read."""
    count = f"{len(unanswered)} of {len(unanswered) + answered} rows"
    if source.without_answer == "skip" and answered:
        rank_zero_info(f"{source.path}: {count} have no answer and are left out")
        return
    row, name = unanswered[0], str(source.answer)
    found = row.value(name, "answer") if row.has(name) or not answered else None
    advice = [f"set data.{split}.without_answer skip to leave such rows out"] if answered else []
    if not is_empty(found):
        advice.insert(0, f"set data.{split}.gold to where the answer stands (whole: the whole field)")
    elif not answered:
        advice.append(f"name the field of the answer in data.{split}.answer")
    if split in NEEDLESS:
        advice.append(f"set data.{split}.answer null if {NEEDLESS[split]}")
    where = "" if source.gold == "whole" else f" at '{source.gold}'"
    wrong = f"{row.place} has no answer in '{name}'{where} ({count} have none)"
    raise UserError(wrong, got=repr(found)[-80:], do=", or ".join(advice))


def _problem(source: Source, row: Row) -> Problem:
    options = None if source.options is None else row.value(source.options, "options")
    text, messages = _prompt(source, row, None if options is None else lettered(options, row.place))
    groups = [source.by] if isinstance(source.by, str) else source.by or []
    by = {name: row.text(name, "by") or "null" for name in groups}
    count = None if options is None else len(options)
    return Problem(text, _gold(source, row, count), by, messages, row.place)


def _gold(source: Source, row: Row, options: int | None) -> Gold | None:
    """The row's right answer; None where it has none."""
    if source.answer is None:
        return None
    value = row.value(source.answer, "answer") if row.has(source.answer) else None
    if is_empty(value):
        return None
    if options is not None:
        return Gold(right_letter(value, options, row.place))
    unit = None if source.unit is None else row.text(source.unit, "unit")
    tolerance = None if source.tolerance is None else row.text(source.tolerance, "tolerance")
    return read_gold(value, source.gold, unit, tolerance, row.place)


def _prompt(source: Source, row: Row, choices: str | None) -> tuple[str, list[Message]]:
    """The problem's text for the policy, with the choices where there are any; the messages of a conversation."""

    def inserted(name: str) -> str:
        found = choices if name == source.options else row.text(name, "prompt")
        if found is None:
            raise UserError(f"{row.place} has no text in '{name}'", got="null")
        return found

    messages: list[Message] = []
    below = "" if choices is None or f"{{{source.options}}}" in source.prompt else f"\n\n{choices}"
    if _FIELD.search(source.prompt):
        text = _FIELD.sub(lambda match: inserted(match[1]), source.prompt)  # in one pass: problems are full of braces
    elif isinstance(row.prompt(source.prompt), list):
        *earlier, last = row.messages(source.prompt)
        messages = [*earlier, {**last, "content": last["content"] + below}]
        text = "\n\n".join(f"{m['role']}: {m['content']}" for m in messages) if earlier else messages[0]["content"]
    else:
        text = inserted(source.prompt)
    if not text.strip():
        raise UserError(f"{row.place} has no text in '{source.prompt}'", got=repr(text)[:80])
    return text if messages else text + below, messages


def _rows(source: Source, split: str) -> Rows:
    """The rows of a source with their places."""
    if "://" in source.path:
        name = re.fullmatch(r"https?://huggingface\.co/datasets/([^/]+/[^/]+)/?", source.path)
        do = f"give the name, {name[1]}" if name else "download the file and give its path"
        raise UserError("The data is a URL, which is not read", got=source.path, do=do)
    path = Path(source.path).expanduser()
    toy = parse_toy_name(source.path) is not None
    if is_data_file(path):
        return _sliced(read_rows(path), source, split)
    rows = _toy_rows(split) if toy else _hub_rows(source)
    placed = ((f"Row {number} of {source.path}", row) for number, row in enumerate(rows, 1))
    return _sliced(placed, source, split) if toy else placed


def _sliced(rows: Rows, source: Source, split: str) -> Rows:
    """The rows that the brackets of a split name."""
    if not re.search(r"[\[+]", source.split):
        return rows
    ends = re.fullmatch(r"\w*\[(-?\d+)?:(-?\d+)?\]", source.split)
    if ends is None:
        expected = "rows by their numbers, such as train[:-500] or train[-500:]"
        raise UserError(
            f"data.{split}.split is not understood", got=f"{source.split} of {source.path}", expected=expected
        )
    return iter([*rows][slice(*[None if end is None else int(end) for end in ends.groups()])])


def _toy_rows(split: str) -> Iterable[dict[str, Any]]:
    return toy_problems("train", TOY_TRAIN) if split == "train" else toy_problems("held_out", TOY_HELD_OUT)


def _hub_rows(source: Source) -> Iterable[dict[str, Any]]:
    if is_local(source.path):
        folder = Path(source.path).expanduser().is_dir()
        wrong = "is a folder" if folder else "has no known ending"
        expected = f"a file: {', '.join(READERS)}, and .gz behind those of text"
        raise UserError(f"The data file {wrong}", got=source.path, expected=expected)
    import datasets

    refuse_almost_toy(source.path)
    load = partial(datasets.load_dataset, source.path, source.subset, split=source.split)
    rows: Iterable[dict[str, Any]] = from_hub("data set", source.path, load)
    return rows
