"""Whether an answer equals the right one: everything that needs no computer algebra."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from rlif_lightning.grading.normalise import (
    MAX_ANSWER,
    answer_key,
    key,
    measured,
    normalise,
    split_answers,
    unit_words,
    without_name,
)
from rlif_lightning.grading.number import as_number, same_number

Several = Literal["one", "ordered", "set"]
Symbolic = Callable[[str, str, float, float], bool]
"""(gold, answer, absolute tolerance, relative tolerance) -> equal, for two formulas."""

MAX_NESTING = 12
MAX_POWERS = 60
MAX_FACTORIALS = 10
MAX_PARTS = 64

_POWER = r"(?:\^|\*\*)\s*[{(]?\s*"
_TOO_HIGH = re.compile(
    rf"[0-9]{{300,}}|{_POWER}[-+]?[0-9]{{7,}}|[0-9.][eE]\+?[0-9]{{4,}}"
    r"|[0-9]{6,}\s*!|!\s*[)}\]]+\s*!|!\s*!\s*!"
)
_TOWER = re.compile(rf"{_POWER}(?=([0-9]+)\s*{_POWER}([0-9]+)(?![0-9]))")
_WORDS = re.compile(r"\s*\\(?:text|mbox|textbf|textrm)\s*\{[^{}0-9]*\}\s*|[A-Za-z]{4,}(?:\s[A-Za-z]+)*")
_BASED = re.compile(r"-?[0-9A-F]+_(?:[0-9]|\{[0-9]+\})")
_LETTER_UNIT = re.compile(r"(?<=[0-9])\s*[mgshlLNJWVK]$")
_EQUATION = re.compile(r"(?<![<>!])=")


@dataclass(frozen=True)
class Rule:
    """How one answer is compared with its right one."""

    several: Several = "one"  # see `AnswerFormat`
    unit: str | None = None  # that the answer may repeat
    absolute: tuple[float, ...] = ()  # allowed absolute differences: none, one for all parts, or one per part
    relative: float = 0.0  # allowed relative difference

    def tolerance(self, place: int) -> float:
        """Allowed absolute difference of a part; the last one given is for all parts beyond it."""
        return self.absolute[min(place, len(self.absolute) - 1)] if self.absolute else 0.0


def too_costly(answer: str) -> bool:
    """Whether an answer is longer, deeper or higher than any honest one, at a glance."""
    return (
        len(answer) > MAX_ANSWER
        or _TOO_HIGH.search(answer) is not None
        or answer.count("^") + answer.count("**") > MAX_POWERS
        or answer.count("!") > MAX_FACTORIALS
        # A power of a power, all in digits, with an exponent of a million or more.
        or any(float(tower[2]) * math.log10(float(tower[1]) or 1) >= 6 for tower in _TOWER.finditer(answer))
        or max(_depths(answer), default=0) > MAX_NESTING
    )


def _depths(text: str) -> list[int]:
    """How many brackets are open after each letter."""
    return list(accumulate((letter in "([{") - (letter in ")]}") for letter in text))


def equal(gold: str, answer: str, rule: Rule, symbolic: Symbolic) -> bool:
    """Whether an answer equals the right one; formulas are left to `symbolic`."""
    if too_costly(answer):
        return gold.strip() == answer.strip()
    wanted = split_answers(gold) if rule.several != "one" else []
    if len(wanted) < 2:
        return _one(gold, answer, rule, rule.tolerance(0), symbolic)
    compare = _ordered if rule.several == "ordered" else _unordered
    return compare(wanted, split_answers(answer), rule, symbolic)


def _ordered(wanted: list[str], given: list[str], rule: Rule, symbolic: Symbolic) -> bool:
    return len(wanted) == len(given) <= MAX_PARTS and all(
        _one(gold, answer, rule, rule.tolerance(place), symbolic)
        for place, (gold, answer) in enumerate(zip(wanted, given, strict=True))
    )


def _unordered(wanted: list[str], given: list[str], rule: Rule, symbolic: Symbolic) -> bool:
    """Every right answer given and nothing else; repeated answers count as one."""
    distinct = [{answer_key(part): (part, place) for place, part in enumerate(parts)} for parts in (wanted, given)]
    left, right = (list(parts.values()) for parts in distinct)
    for gold, place in left if len(left) == len(right) <= MAX_PARTS else [("", 0)]:
        same = (pair for pair in right if _one(gold, pair[0], rule, rule.tolerance(place), symbolic))
        if (found := next(same, None)) is None:
            return False
        right.remove(found)
    return True


def _one(gold: str, answer: str, rule: Rule, absolute: float, symbolic: Symbolic) -> bool:
    """Compare single answers: as text, as numbers, as brackets of parts, at last as formulas."""
    if _WORDS.fullmatch(gold):  # else the letters of a word would count as factors in any order
        return normalise(gold).casefold() == normalise(answer).casefold()
    (wanted, unit), (given, other) = measured(gold, rule.unit), measured(answer, rule.unit)
    if other and (unit or unit_words(rule.unit or "")) not in ((), other):
        return False
    wanted, given = _without_names(wanted, given)
    if not given:
        return False
    number = as_number(wanted)
    if number and not unit:
        given = _LETTER_UNIT.sub("", given)
    if key(wanted) == key(given):
        return True
    if number and (answered := as_number(given)):
        return same_number(number, answered, absolute=absolute, relative=rule.relative)
    if _BASED.fullmatch(key(wanted)) and _BASED.fullmatch(key(given)):
        return False  # 52_8 is not 52_9, though math-verify drops the base
    if _shape(wanted) and _shape(wanted) == _shape(given):
        parts = split_answers(wanted[1:-1])
        if len(parts) > 1:
            part_rule = Rule("ordered", None, (absolute,), rule.relative)
            return _ordered(parts, split_answers(given[1:-1]), part_rule, symbolic)
    return symbolic(wanted, given, absolute, rule.relative)


def _without_names(one: str, other: str) -> tuple[str, str]:
    """Two answers without the `x =` in front, unless it makes one of them an equation that differs."""
    (name, value), (other_name, other_value) = without_name(one), without_name(other)
    differ = name and (other_name or _EQUATION.search(other)), other_name and (name or _EQUATION.search(one))
    return (one, other) if name != other_name and any(differ) else (value, other_value)


def _shape(text: str) -> tuple[str, str] | None:
    """The outer brackets of a point or an interval, if one pair encloses all of it."""
    if len(text) < 3 or text[0] not in "([" or text[-1] not in ")]" or 0 in _depths(text)[:-1]:
        return None
    return text[0], text[-1]
