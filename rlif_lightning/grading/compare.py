r"""Whether an answer equals the right one: everything that needs no computer algebra.

The rules run twice: in the training process without a `symbolic` comparison, where they leave open what they
cannot decide (None), and in the worker with one. So both agree by construction.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from rlif_lightning.grading.normalise import MAX_ANSWER, answer_key, clean, normalise, split_answers, without_name
from rlif_lightning.grading.number import as_number, same_number

Several = Literal["one", "ordered", "set"]
Symbolic = Callable[[str, str, float, float], bool]
"""(gold, answer, absolute tolerance, relative tolerance) -> equal."""

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
_THOUSANDS_COMMA = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")


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


def equal(gold: str, answer: str, rule: Rule, symbolic: Symbolic | None = None) -> bool | None:
    """Whether an answer equals the right one; None where only `symbolic` could tell and there is none."""
    if too_costly(answer):
        return gold.strip() == answer.strip()
    wanted = split_answers(gold) if rule.several != "one" else []
    if len(wanted) > 1:
        compare = _ordered if rule.several == "ordered" else _unordered
        return compare(wanted, split_answers(answer), rule, symbolic)
    return _one(gold, answer, rule, rule.tolerance(0), symbolic)


def _ordered(wanted: list[str], given: list[str], rule: Rule, symbolic: Symbolic | None) -> bool | None:
    if len(wanted) != len(given) or len(given) > MAX_PARTS:
        return False
    sure = True
    for place, (gold, answer) in enumerate(zip(wanted, given, strict=True)):
        verdict = _one(gold, answer, rule, rule.tolerance(place), symbolic)
        if verdict is False:
            return False
        sure &= verdict is True
    return sure or None


def _unordered(wanted: list[str], given: list[str], rule: Rule, symbolic: Symbolic | None) -> bool | None:
    """Every right answer given once and nothing else; repeated answers count as one if that is needed."""
    verdict = _matching(wanted, given, rule, symbolic)
    once, given_once = (list({answer_key(part): part for part in parts}.values()) for parts in (wanted, given))
    if verdict is False and (once, given_once) != (wanted, given):
        return _matching(once, given_once, rule, symbolic)
    return verdict


def _matching(wanted: list[str], given: list[str], rule: Rule, symbolic: Symbolic | None) -> bool | None:
    if len(wanted) != len(given) or len(given) > MAX_PARTS:
        return False
    left = list(given)
    unmatched = []
    for place, gold in enumerate(wanted):
        absolute = rule.tolerance(place)
        verdicts = [_one(gold, answer, rule, absolute, None) for answer in left]
        if True in verdicts:
            del left[verdicts.index(True)]
        elif None not in verdicts:
            return False
        else:
            unmatched.append((gold, absolute))
    if unmatched and symbolic is None:
        return None
    for gold, absolute in unmatched:
        same = next((answer for answer in left if _one(gold, answer, rule, absolute, symbolic)), None)
        if same is None:
            return False
        left.remove(same)
    return True


def _one(gold: str, answer: str, rule: Rule, absolute: float, symbolic: Symbolic | None) -> bool | None:
    """Compare single answers: as text, as numbers, as brackets of parts, at last as formulas."""
    if normalise(gold, rule.unit) == normalise(answer, rule.unit):
        return True
    if _WORDS.fullmatch(gold):  # else the letters of a word would count as factors in any order
        return normalise(gold).casefold() == normalise(answer).casefold()
    wanted, given = clean(gold, rule.unit), clean(answer, rule.unit)
    (name, value), (other_name, other_value) = without_name(wanted), without_name(given)
    if not (name and other_name and name != other_name):
        wanted, given = value, other_value
    if not given:
        return False
    if normalise(wanted) == normalise(given):
        return True
    number, answered = (as_number(_THOUSANDS_COMMA.sub("", text)) for text in (wanted, given))
    if number and answered:
        return same_number(number, answered, absolute=absolute, relative=rule.relative)
    if _BASED.fullmatch(normalise(wanted)) and _BASED.fullmatch(normalise(given)):
        return False  # 52_8 is not 52_9, though math-verify drops the base
    if _shape(wanted) and _shape(wanted) == _shape(given):
        parts = split_answers(wanted[1:-1])
        if len(parts) > 1:
            part_rule = Rule("ordered", None, (absolute,), rule.relative)
            return _ordered(parts, split_answers(given[1:-1]), part_rule, symbolic)
    return symbolic(wanted, given, absolute, rule.relative) if symbolic else None


def _shape(text: str) -> tuple[str, str] | None:
    """The outer brackets of a point or an interval, if one pair encloses all of it."""
    if len(text) < 3 or text[0] not in "([" or text[-1] not in ")]" or 0 in _depths(text)[:-1]:
        return None
    return text[0], text[-1]
