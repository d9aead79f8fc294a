r"""Find the answer in a text: a box, a number, a letter, a literal, the whole, or a pattern's last match.

Texts are a model's own words and may be hostile. Boxes are found in one pass, whatever their number and
nesting; patterns see the last characters only, and their search ends after `PATTERN_SECONDS`.
"""

import re
import sys
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import regex

from rlif_lightning.errors import UserError, did_you_mean
from rlif_lightning.grading.choices import find_choice
from rlif_lightning.grading.literals import find_literal

WINDOWS = {"whole": sys.maxsize, "literal": sys.maxsize, "boxed": 100_000}
PATTERN_WINDOW = 4_000
"""Patterns and the other places see this many characters at the end of a text, where an answer stands:
it bounds a quadratic search to some tens of milliseconds."""

PATTERN_SECONDS = 1.0  # CPU time after which the search for a pattern is given up; an honest one takes microseconds
_BOX_TOKENS = re.compile(
    r"(?P<box>\\(?:boxed|fbox|framebox)(?![A-Za-z])\s{0,4}(?:\[[^\]\n]{0,20}\]\s{0,4}){0,2})(?P<brace>\{)?"
    r"|\\.|[{}]",
    re.DOTALL,
)
_BARE_BOX = re.compile(r"[-+]?[0-9A-Za-z.,/]+")

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_NUMBER = re.compile(
    r"(?P<sign>(?<![0-9A-Za-z)\]}])[-\u2212]\s?)?"
    r"\\?\$?\s?"
    r"(?P<value>"
    r"\\[dt]?frac\{-?[0-9]+\}\{-?[0-9]+\}"
    rf"|{_DIGITS}\s?/\s?[0-9]+(?![0-9.])"
    rf"|(?:{_DIGITS}(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]+(?![0-9A-Za-z]))?"
    r")"
)


class Found(NamedTuple):
    """An answer, and the characters [start, end) of the text that say it."""

    text: str
    start: int
    end: int


def check_where(where: str) -> None:
    """Refuse a place that `locate` could not use with a UserError."""
    if where in PLACES:
        return
    try:
        if (groups := _compiled(where).groups) == 1:
            return
        wrong = f"Where to find the answer must be a pattern with one group, not with {groups} groups"
        do = "put ( ) around the answer and (?: ) around everything else"
    except (regex.error, ValueError) as error:
        wrong, do = f"Where to find the answer is not a valid regular expression: {error}", "correct the expression"
    raise UserError(
        wrong,
        got=repr(where),
        expected=f"{', '.join(PLACES)}, or a regular expression with exactly one capture group",
        do=did_you_mean(where.lower(), PLACES, repr) or do,
    )


def extract(text: str, where: str) -> str | None:
    """The answer that `locate` finds, or None."""
    found = locate(text, where)
    return found.text if found else None


def locate(text: str, where: str) -> Found | None:
    r"""Find an answer, and leave out surrounding white space (of a number commas and currency as well).

    Of `where` it is `"whole"`: all of the text. `"boxed"`: the inside of the last closed `\boxed{}`, `\fbox{}` or
    `\framebox{}`. `"last_number"`: the last number, with sign, thousands commas, decimals, exponent or as a fraction.
    `"choice"`: see `find_choice`. `"literal"`: see `find_literal`. Anything else is a regular expression whose one
    group is the answer; its last match counts.
    """
    begin = max(len(text) - WINDOWS.get(where, PATTERN_WINDOW), 0)
    tail = text[begin:]
    if where == "last_number":
        return _last_number(tail, begin)
    span = FINDERS[where](tail) if where in FINDERS else _last_match(tail, where)
    if span is None:
        return None
    inside = tail[slice(*span)]
    start = begin + span[0] + len(inside) - len(inside.lstrip())
    answer = inside.strip()
    return Found(answer, start, start + len(answer)) if answer else None


@lru_cache(maxsize=64)
def _compiled(where: str) -> regex.Pattern[str]:
    return regex.compile(where, regex.VERSION0)  # the syntax of Python's re, with more


def _last_match(text: str, where: str) -> tuple[int, int] | None:
    try:
        matches = list(_compiled(where).finditer(text, timeout=PATTERN_SECONDS))
    except TimeoutError:
        _warn_of_timeout(where)
        return None
    return matches[-1].span(1) if matches and matches[-1].start(1) >= 0 else None


@lru_cache(maxsize=64)
def _warn_of_timeout(where: str) -> None:
    """Say it once for each pattern."""
    warnings.warn(
        f"The search for an answer by {where!r} was given up after {PATTERN_SECONDS:g} s: such a text counts as one "
        "without an answer. Bound the pattern's repeats, e.g. {1,20}, or put a fixed character between them.",
        stacklevel=2,
    )


def _last_box(text: str) -> tuple[int, int] | None:
    """Inside of the closed box that starts last; one pass with a stack, so linear in the text."""
    opened: list[int] = []  # where the inside of a box starts; -1 for any other brace
    last = (-1, -1)
    for token in _BOX_TOKENS.finditer(text):
        begin = token.end()
        if token["brace"]:
            opened.append(begin)
        elif token["box"]:
            if bare := _BARE_BOX.match(text, begin):
                last = (begin, begin + len(bare.group().rstrip(".,")))
        elif token.group() == "{":
            opened.append(-1)
        elif token.group() == "}" and opened and (begin := opened.pop()) > last[0]:
            last = (begin, token.start())
    return last if last[0] >= 0 else None


def _last_number(text: str, begin: int) -> Found | None:
    """The last number of a text that begins at `begin`, without commas, spaces and currency."""
    matches = list(_NUMBER.finditer(text))
    if not matches:
        return None
    last, sign = matches[-1], "-" if matches[-1]["sign"] else ""
    start = last.start("sign" if sign else "value")
    return Found(sign + last["value"].replace(",", "").replace(" ", ""), begin + start, begin + last.end())


FINDERS: dict[str, Callable[[str], tuple[int, int] | None]] = {
    "whole": lambda text: (0, len(text)),
    "boxed": _last_box,
    "choice": find_choice,
    "literal": find_literal,
}
PLACES = (*FINDERS, "last_number")
