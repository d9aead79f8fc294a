"""Whether an answer equals the right one: everything that needs no computer algebra."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from rlif_lightning.grading.normalise import (
    LETTER,
    MAX_ANSWER,
    MONEY,
    depths,
    key,
    measured,
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
MAX_UNIONS = 19

_RAISED = r"(?:\^|\*\*)\s*"
_POWER = rf"{_RAISED}[{{(]?\s*"
_TOO_HIGH = re.compile(
    rf"[0-9]{{300,}}|{_POWER}[-+]?[0-9]{{7,}}|[0-9.][eE]\+?[0-9]{{4,}}"
    r"|[0-9]{6,}\s*!|!\s*[)}\]]+\s*!|!\s*!\s*!"
    rf"|(?:{_RAISED}(?:[{{(][^{{}}()^*]*|\\?[A-Za-z0-9.]+\s*)){{2}}{_RAISED}"  # e^{e^{e^x}}
    r"|(?:\\?exp\s*[({]\s*){3}"
    rf"|{_RAISED}[{{(][^{{}}]*!"  # a^{n!}
    rf"|\(\s*\([^()]*\)\s*{_RAISED}(?:\{{[^{{}}]*\}}|[A-Za-z0-9]+)\s*\)\s*{_RAISED}"  # ((a)^b)^c
    rf"|\\[dt]?binom\s*(?:\{{[^{{}}]*\}}\s*)?\{{[^{{}}]*(?:\^|[0-9]{{7}})"  # of numbers that are powers
    r"|\\(?:i*int|oint|lim)(?![A-Za-z])"  # still to be worked out
    r"|\\(?:sum|prod)\s*_(?:\{[^{}]*\}|.)\s*\^\s*\{?[^{}]*?(?:\^|[0-9]{4})"  # of very many terms
)
_UNION = re.compile(r"\\(?:cup|cap)(?![A-Za-z])|[\u222a\u2229]|\bor\b")
_TOWER = re.compile(rf"{_POWER}[-+]?\s*(?=([0-9]+)\s*{_POWER}([0-9]+)(?![0-9]))")
_WORDS = re.compile(r"\s*\\(?:text|mbox|textbf|textrm)\s*\{[^{}0-9]*\}\s*|[A-Za-z]{4,}(?:\s[A-Za-z]+)*")
_BASED = re.compile(r"-?[0-9A-F]+_(?:[0-9]|\{[0-9]+\})")
_LETTER_UNIT = re.compile(r"(?<=[0-9}])\s*[mgshlLNJWV]$")
_SPACES = re.compile(r"\s+(?=[A-Za-z])")
_GLUED = re.compile(  # {0}42, 0{42}
    r"(?:^|[-+*/=(,;])\s*(?:[{\[][^{}\[\]]*[0-9][^{}\[\]]*[}\]]\s*\{?|[0-9.]+\s*\{)\s*[0-9]"
)
_EQUATION = re.compile(r"(?<![<>!])=")


def too_costly(answer: str) -> bool:
    """Whether an answer is longer, deeper or higher than any honest one, at a glance."""
    return (
        len(answer) > MAX_ANSWER
        or _TOO_HIGH.search(answer) is not None
        or answer.count("^") + answer.count("**") > MAX_POWERS
        or answer.count("!") > MAX_FACTORIALS
        # A power of a power, all in digits, with an exponent above 3,000.
        or any(float(tower[2]) * math.log10(float(tower[1]) or 1) >= 3.5 for tower in _TOWER.finditer(answer))
        or len(_UNION.findall(answer)) > MAX_UNIONS
        or max(depths(answer), default=0) > MAX_NESTING
    )


class Rule(NamedTuple):
    """How answers are compared with a right one."""

    symbolic: Symbolic  # for what is left after text and numbers
    several: Several = "one"  # see `AnswerFormat`
    unit: str | None = None  # that the answer may repeat
    absolute: Sequence[float] = ()  # allowed absolute differences: none, or one per part, the last for all beyond it
    relative: float = 0.0  # allowed relative difference

    def equal(self, gold: str, answer: str) -> bool:
        """Whether an answer equals the right one."""
        wanted = split_answers(gold) if self.several != "one" else []
        if len(wanted) < 2:
            return self._one(gold, answer, 0)
        given = split_answers(answer)
        if self.several == "set":
            return self._unordered(wanted, given)
        return self._ordered(wanted, given)

    def _ordered(self, wanted: list[str], given: list[str]) -> bool:
        pairs = zip(wanted, given, strict=False)
        return len(wanted) == len(given) <= MAX_PARTS and all(self._one(*pair, n) for n, pair in enumerate(pairs))

    def _unordered(self, wanted: list[str], given: list[str]) -> bool:
        """Every right answer given and nothing else; repeated answers count as one."""
        places = {key(part): place for place, part in enumerate(wanted)}
        left = {key(part): part for part in given}
        if not len(places) == len(left) <= MAX_PARTS:
            return False
        for place in places.values():
            found = next((name for name, part in left.items() if self._one(wanted[place], part, place)), None)
            if found is None:
                return False
            del left[found]
        return True

    def _one(self, gold: str, answer: str, place: int) -> bool:
        """Compare single answers: as text, as numbers, as brackets of parts, at last as formulas."""
        if _WORDS.fullmatch(gold):  # else the letters of a word would count as factors in any order
            return key(measured(gold)[0]).casefold() == key(measured(answer)[0]).casefold()
        if _SPACES.sub("", gold) == _SPACES.sub("", answer):
            return bool(answer.strip())
        (wanted, unit), (given, other) = measured(gold, self.unit), measured(answer, self.unit)
        if units_differ(unit or unit_words(self.unit or ""), other):
            return False
        if wanted.endswith("%") != given.endswith("%") and (other if wanted.endswith("%") else unit):
            return False  # 18 dollars are not 18 %
        wanted, given = _without_names(wanted, given)
        number = as_number(wanted)
        if not unit and not LETTER.search(wanted):
            given = _LETTER_UNIT.sub("", given)
        if not given or key(wanted) == key(given):
            return bool(given)
        absolute = self.absolute[min(place, len(self.absolute) - 1)] if self.absolute else 0.0
        if number and (answered := as_number(given)):
            return same_number(number, answered, absolute=absolute, relative=self.relative)
        if _BASED.fullmatch(key(wanted)) and _BASED.fullmatch(key(given)):
            return False  # 52_8 is not 52_9, though math-verify drops the base
        if _shape(wanted) and _shape(wanted) == _shape(given) and len(parts := split_answers(wanted[1:-1])) > 1:
            rule = self._replace(unit=None, absolute=(absolute,))
            return rule._ordered(parts, split_answers(given[1:-1]))
        if _GLUED.search(given) or {"point", "several"} == {_holds(wanted), _holds(given)}:
            return False
        return self.symbolic(wanted, given, absolute, self.relative)


def same_text(gold: str, answer: str, unit: str | None) -> bool:
    """Whether two answers are one text after normalisation, and their units, if both have some, too."""
    (wanted, one), (given, other) = measured(gold, unit), measured(answer, unit)
    return key(wanted) == key(given) and not units_differ(one or unit_words(unit or ""), other)


def units_differ(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    """Whether two answers name different units; 18 dollars may be 18 dollars per hour, but 5 m are not 5 m/s."""
    short, long = sorted((one, other), key=len)
    is_amount = len(short) == 1 and short[0] in MONEY and short[0] in long
    return bool(short) and one != other and not is_amount


def _without_names(one: str, other: str) -> tuple[str, str]:
    """Two answers without the `x =` in front, unless it makes one of them an equation that differs."""
    (name, value), (other_name, other_value) = without_name(one), without_name(other)
    differ = name and (other_name or _EQUATION.search(other)), other_name and (name or _EQUATION.search(one))
    return (one, other) if name != other_name and any(differ) else (value, other_value)


def _holds(text: str) -> str | None:
    r"""Whether a text is a `point` (or an interval), or holds `several` answers as `\{1,2\}` and `1;2` do."""
    if _shape(text):
        return "point" if len(split_answers(text[1:-1])) > 1 else None
    several = ";" in text or re.fullmatch(r"\\?\{.*\}", text, re.DOTALL)
    return "several" if several and len(split_answers(text)) > 1 else None


def _shape(text: str) -> tuple[str, str] | None:
    """The outer brackets of a point or an interval, if one pair encloses all of it."""
    if len(text) < 3 or text[0] not in "([" or text[-1] not in ")]" or 0 in depths(text)[:-1]:
        return None
    return text[0], text[-1]
