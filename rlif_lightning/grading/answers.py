"""What counts as a right answer: the declarative settings of a recipe, and the right answer itself."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from rlif_lightning.errors import UserError
from rlif_lightning.grading.compare import Several
from rlif_lightning.grading.extraction import Found, check_where, extract, locate
from rlif_lightning.grading.literals import read_literal

Compare = Literal["math", "text", "exact", "literal"]


@dataclass(frozen=True)
class Gold:
    """The right answer to one problem."""

    text: str
    unit: str | None = None  # that an answer may repeat
    tolerance: tuple[float, ...] = ()  # allowed absolute differences: none, one for all parts, or one per part


@dataclass(frozen=True)
class AnswerFormat:
    r"""How the answer of a completion is found and compared; a recipe writes these settings in YAML.

    A place is `whole` (all of the text), `boxed` (the last `\boxed{}`), `last_number`, `choice` (the letter of an
    option), `literal` (a Python literal), or a regular expression with one capture group, of which the last match
    counts.

    Args:
        completion: Place of the answer in a completion; of several places the first that holds an answer counts.
        compare: How answers are compared. ``math``: equal in value, numbers exactly, formulas as math-verify reads
            them. ``text``: equal after normalisation of numbers, spaces and LaTeX. ``exact``: equal letter by
            letter. ``literal``: equal as Python values, which are read and never run.
        several: How a right answer that is a comma-separated list is compared: ``one`` takes it as a single answer,
            ``ordered`` compares part by part, ``set`` in any order. A point or an interval in brackets is one part.
        relative_tolerance: Relative error that a number may have. 0 compares integers and fractions exactly and
            decimals to six significant digits.
        unfinished_is_wrong: Give no answer to a completion that was cut off at its longest length.
    """

    completion: str | list[str] = "boxed"
    compare: Compare = "math"
    several: Several = "one"
    relative_tolerance: float = 0.0
    unfinished_is_wrong: bool = False

    def __post_init__(self) -> None:
        if not self.places:
            raise UserError("No place to find the answer in", got=self.completion, do="name at least one")
        for where in self.places:
            check_where(where)
        for name, value, kind in (("compare", self.compare, Compare), ("several", self.several, Several)):
            if value not in get_args(kind):
                raise UserError(f"Unknown answers.{name}", got=repr(value), expected=" | ".join(get_args(kind)))
        if not 0 <= self.relative_tolerance < 1:
            expected = "a number from 0 to below 1, such as 0.01 for one per cent"
            raise UserError("answers.relative_tolerance is wrong", got=self.relative_tolerance, expected=expected)

    @property
    def places(self) -> list[str]:
        """The places in a completion, first choice first."""
        return [self.completion] if isinstance(self.completion, str) else self.completion

    def locate(self, completion: str, ended: bool = True) -> Found | None:
        """The answer in a completion, which ended by itself or (False) was cut off at its longest length."""
        if self.unfinished_is_wrong and not ended:
            return None
        return next((found for where in self.places if (found := locate(completion, where))), None)


@dataclass(frozen=True)
class SourceAnswers:
    """What is different from ``data.answers`` for one source; null: as there.

    Args:
        completion: Place, or places, of the answer in a completion.
        compare: How answers are compared.
        several: How a right answer that is a comma-separated list is compared.
        relative_tolerance: Relative error that a number may have.
        unfinished_is_wrong: Give no answer to a completion that was cut off at its longest length.
    """

    completion: str | list[str] | None = None
    compare: Compare | None = None
    several: Several | None = None
    relative_tolerance: float | None = None
    unfinished_is_wrong: bool | None = None

    def over(self, format: AnswerFormat) -> AnswerFormat:
        """A format with these settings in place of its own."""
        return replace(format, **{name: value for name, value in vars(self).items() if value is not None})


def check_gold(format: AnswerFormat, gold: Gold, place: str) -> None:
    """Refuse a right answer that no completion could equal with a UserError; `place` says which row it is from."""
    if format.compare == "literal" and not read_literal(gold.text):
        raise UserError(
            f"{place}: the right answer is not a Python literal",
            got=repr(gold.text)[:80],
            expected="a number, string, bytes, True, False, None, or a list, tuple, dict or set of these",
            do="name another answer field, or set answers.compare to text",
        )


def read_gold(
    value: Any, where: str = "whole", unit: Any = None, tolerance: Any = None, place: str = "A row"
) -> Gold | None:
    """The right answer in the fields of a row, which `place` names; None where the answer field has none."""
    text = extract(gold_text(value, place), where)
    return Gold(text, str(unit or "").strip() or None, read_tolerance(tolerance, place)) if text else None


def gold_text(value: Any, place: str = "A row") -> str:
    """The text of an answer field: 27.0 becomes `27`, `["2", "3"]` becomes `2, 3`."""
    if isinstance(value, str | int):  # True and False as well
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() and abs(value) < 1e16 else repr(value)
    if isinstance(value, list) and value and not any(isinstance(part, list) for part in value):
        return ", ".join(gold_text(part, place) for part in value)
    raise UserError(
        f"{place}: the answer field holds no answer",
        got=f"{repr(value)[:80]} ({type(value).__name__})",
        expected="text, a finite number, true or false, or a list of these",
        do="name another field in data.*.answer; one within it with a dot: reward_model.ground_truth",
    )


def read_tolerance(value: Any, place: str = "A row") -> tuple[float, ...]:
    """The absolute differences that a tolerance field allows: none, one, or one per part ("1e-1,1e-2")."""
    parts = [] if value is None or value == "" else str(value).split(",")
    try:
        numbers = tuple(0.0 if part.strip() in ("", "null", "None") else float(part) for part in parts)
    except ValueError:
        numbers = (-1.0,)
    if all(0 <= number < math.inf for number in numbers):
        return numbers
    expected = "null, a number not below 0, or text such as 1e-1 or 1e-1,1e-2"
    raise UserError(f"{place}: the tolerance field holds no tolerance", got=repr(value), expected=expected)
