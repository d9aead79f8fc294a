r"""Find the answer in a text: a box, a number, a letter, a literal, the whole, or a pattern's last match.

Texts are a model's own words and may be hostile. Boxes are found in one pass, whatever their number and
nesting; patterns look only at the last `PATTERN_WINDOW` characters, and patterns that can take exponential
time are refused before any text is seen.
"""

import difflib
import re
from functools import lru_cache

from rlif_lightning.errors import UserError
from rlif_lightning.grading.backtracking import can_explode
from rlif_lightning.grading.choices import find_choice
from rlif_lightning.grading.literals import find_literal

PLACES = ("whole", "boxed", "last_number", "choice", "literal")

PATTERN_WINDOW = 4_000
"""A pattern and `last_number` see this many characters at the end of a text: 4,000 bounds a quadratic
search to some tens of milliseconds, and an answer stands at the end."""

BOX_WINDOW = 100_000
"""A box must start within this many characters of the end."""

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


def check_where(where: str) -> None:
    """Refuse a place that `extract` could not use.

    Args:
        where: One of `PLACES`, or a regular expression with exactly one capture group.

    Raises:
        UserError: `where` is neither, or its pattern can take exponential time.
    """
    if where in PLACES:
        return
    names = ", ".join(PLACES)
    expected = f"{names}, or a regular expression with exactly one capture group"
    near = difflib.get_close_matches(where.lower(), PLACES, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}?" if near else None
    try:
        pattern = _compiled(where)
    except re.error as error:
        raise UserError(
            f"Where to find the answer is no valid regular expression: {error}",
            got=repr(where),
            expected=expected,
            do=hint or "correct the expression",
        ) from None
    if pattern.groups != 1:
        raise UserError(
            "Where to find the answer must capture one group",
            got=f"{where!r} with {pattern.groups} groups",
            expected=expected,
            do=hint or "put ( ) around the answer and (?: ) around everything else",
        )
    if can_explode(where):
        raise UserError(
            "Where to find the answer can take exponential time on a hostile text",
            got=repr(where),
            expected="no repeat directly inside another repeat, as in (?:a+)+",
            do="bound one of the repeats, e.g. {1,20}, or put a fixed character between them",
        )


def extract(text: str, where: str) -> str | None:
    r"""Read an answer out of a text.

    Args:
        text: A completion, or the value of a data set's answer field.
        where: `"whole"`: all of the text. `"boxed"`: the inside of the last closed `\boxed{}`, `\fbox{}` or
            `\framebox{}`. `"last_number"`: the last number, with sign, thousands commas, decimals, exponent
            or as a fraction. `"choice"`: the letter of an option, see
            :func:`~rlif_lightning.grading.choices.find_choice`. `"literal"`: a Python literal, see
            :func:`~rlif_lightning.grading.literals.find_literal`. Anything else is a regular expression whose one
            group is the answer; its last match counts. A pattern and `"last_number"` see only the last
            `PATTERN_WINDOW` characters.

    Returns:
        The answer without surrounding white space, or None where there is none.
    """
    if where == "whole":
        found: str | None = text
    elif where == "boxed":
        found = _last_box(text)
    elif where == "last_number":
        found = _last_number(text[-PATTERN_WINDOW:])
    elif where == "choice":
        found = find_choice(text)
    elif where == "literal":
        found = find_literal(text)
    else:
        found = None
        for match in _compiled(where).finditer(text[-PATTERN_WINDOW:]):
            found = match.group(1)
    found = found.strip() if found is not None else ""
    return found or None


@lru_cache(maxsize=64)
def _compiled(where: str) -> re.Pattern[str]:
    return re.compile(where)


def _last_box(text: str) -> str | None:
    """Inside of the closed box that starts last; one pass with a stack, so linear in the text."""
    text = text[-BOX_WINDOW:]
    if "\\boxed" not in text and "\\fbox" not in text and "\\framebox" not in text:
        return None
    opened: list[int | None] = []  # where the inside of a box starts; None for any other brace
    best: tuple[int, str] | None = None
    last = (-1, -1)
    for token in _BOX_TOKENS.finditer(text):
        if token["box"] is not None and token["brace"]:
            opened.append(token.end())
        elif token["box"] is not None:
            head_weight_only = _BARE_BOX.match(text, token.end())
            if head_weight_only:
                best, last = (token.end(), head_weight_only.group().rstrip(".,")), (-1, -1)
        elif token.group() == "{":
            opened.append(None)
        elif token.group() == "}" and opened:
            begin = opened.pop()
            if begin is not None and begin > max(last[0], best[0] if best else -1):
                last = (begin, token.start())
    if last[0] >= 0:
        return text[last[0] : last[1]]
    return best[1] if best else None


def _last_number(text: str) -> str | None:
    found = None
    for match in _NUMBER.finditer(text):
        found = match
    if found is None:
        return None
    value = found["value"].replace(",", "").replace(" ", "")
    return ("-" if found["sign"] else "") + value
