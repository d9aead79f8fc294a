r"""Find the answer in a text: a box, a number, a letter, a literal, the whole, or a pattern's last match.

Texts are a model's own words and may be hostile. Boxes are found in one pass, whatever their number and
nesting; patterns see the last characters only, and their search ends after `PATTERN_SECONDS`.
"""

import difflib
import re
import warnings
from functools import lru_cache
from typing import NamedTuple

import regex

from rlif_lightning.errors import UserError
from rlif_lightning.grading.choices import find_choice
from rlif_lightning.grading.literals import find_literal

PLACES = ("whole", "boxed", "last_number", "choice", "literal")

PATTERN_WINDOW = 4_000
"""Patterns, `last_number` and `choice` see this many characters at the end of a text, where an answer stands:
it bounds a quadratic search to some tens of milliseconds."""

WINDOWS = {"whole": None, "literal": None, "boxed": 100_000}
"""The places that see more; None: all of the text."""

PATTERN_SECONDS = 1.0
"""CPU time after which the search for a pattern is given up; an honest one takes microseconds."""

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
    """Refuse a place that `locate` could not use.

    Raises:
        UserError: It is neither one of `PLACES` nor a regular expression with exactly one capture group.
    """
    if where in PLACES:
        return
    expected = f"{', '.join(PLACES)}, or a regular expression with exactly one capture group"
    near = difflib.get_close_matches(where.lower(), PLACES, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}?" if near else None
    try:
        groups = _compiled(where).groups
    except (regex.error, ValueError) as error:
        raise UserError(
            f"Where to find the answer is no valid regular expression: {error}",
            got=repr(where),
            expected=expected,
            do=hint or "correct the expression",
        ) from None
    if groups != 1:
        raise UserError(
            "Where to find the answer must capture one group",
            got=f"{where!r} with {groups} groups",
            expected=expected,
            do=hint or "put ( ) around the answer and (?: ) around everything else",
        )


def extract(text: str, where: str) -> str | None:
    """The answer that `locate` finds, or None."""
    found = locate(text, where)
    return found.text if found else None


def locate(text: str, where: str) -> Found | None:
    r"""Find an answer in a text.

    Args:
        text: A completion, or the value of a data set's answer field.
        where: `"whole"`: all of the text. `"boxed"`: the inside of the last closed `\boxed{}`, `\fbox{}` or
            `\framebox{}`. `"last_number"`: the last number, with sign, thousands commas, decimals, exponent
            or as a fraction. `"choice"`: the letter of an option, see
            :func:`~rlif_lightning.grading.choices.find_choice`. `"literal"`: a Python literal, see
            :func:`~rlif_lightning.grading.literals.find_literal`. Anything else is a regular expression whose one
            group is the answer; its last match counts.

    Returns:
        The answer without surrounding white space (a number without commas and currency as well), or None where
        there is none.
    """
    window = WINDOWS.get(where, PATTERN_WINDOW)
    begin = max(len(text) - window, 0) if window else 0
    tail = text[begin:]
    if where == "last_number":
        return _last_number(tail, begin)
    if where == "whole":
        span: tuple[int, int] | None = (0, len(tail))
    elif where == "boxed":
        span = _last_box(tail)
    elif where == "choice":
        span = find_choice(tail)
    elif where == "literal":
        span = find_literal(tail)
    else:
        span = _last_match(tail, where)
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
    span = (-1, -1)
    try:
        for match in _compiled(where).finditer(text, timeout=PATTERN_SECONDS):
            span = match.span(1)
    except TimeoutError:
        _warn_of_timeout(where)
        return None
    return span if span[0] >= 0 else None


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
    opened: list[int | None] = []  # where the inside of a box starts; None for any other brace
    bare = last = (-1, -1)
    for token in _BOX_TOKENS.finditer(text):
        if token["box"] is not None and token["brace"]:
            opened.append(token.end())
        elif token["box"] is not None:
            if found := _BARE_BOX.match(text, token.end()):
                bare, last = (token.end(), token.end() + len(found.group().rstrip(".,"))), (-1, -1)
        elif token.group() == "{":
            opened.append(None)
        elif token.group() == "}" and opened:
            begin = opened.pop()
            if begin is not None and begin > max(last[0], bare[0]):
                last = (begin, token.start())
    found_last = last if last[0] >= 0 else bare
    return found_last if found_last[0] >= 0 else None


def _last_number(text: str, begin: int) -> Found | None:
    matches = list(_NUMBER.finditer(text))
    if not matches:
        return None
    last = matches[-1]
    value = last["value"].replace(",", "").replace(" ", "")
    start = last.start("sign" if last["sign"] else "value")
    return Found(("-" if last["sign"] else "") + value, begin + start, begin + last.end())
