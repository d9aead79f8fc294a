"""Multiple choice: options as lettered lines, and the letter that a text chooses."""

import re
from string import ascii_uppercase
from typing import Any

from rlif_lightning.errors import UserError

_DRESS = r"(?:[\s:=*_$`\"'({\[]|\\[(\[]|\\(?:text|textbf|mathrm|mathbf|boxed)(?=\{))"
_STATED = re.compile(
    rf"\b(?:answer|option|choice)\b\s{{0,4}}(?:(?:is|:|=)|(?={_DRESS}{{0,4}}\())"
    rf"{_DRESS}{{0,12}}(?:(?:option|choice|letter)\s{{1,4}}{_DRESS}{{0,4}})?"
    r"(?-i:([A-Z]))(?![\w'])",
    re.IGNORECASE,
)
_BOXED = re.compile(rf"\\(?:boxed|fbox)\s{{0,4}}\{{{_DRESS}{{0,8}}([A-Z])(?![\w'])")
# A lone A or I before a small letter is a word of English.
_ALONE = re.compile(r"(?<![\w'.$\\])([B-HJ-Z]|[AI](?![ \t]{1,4}[a-z]))(?![\w'])(?!\.[A-Za-z])")


def find_choice(text: str) -> tuple[int, int] | None:
    r"""Where the letter stands that a text chooses.

    The last ``\boxed{C}``; else the last letter that is called the answer, as in "the answer is (C)"; else the last
    capital letter that stands alone.
    """
    for pattern in (_BOXED, _STATED, _ALONE):
        if spans := [match.span(1) for match in pattern.finditer(text)]:
            return spans[-1]
    return None


def lettered(options: Any, place: str) -> str:
    """Options, 2 to 26 texts or numbers, as lines ``A. first``, ``B. second``; `place` names their row."""
    fit = isinstance(options, list) and 2 <= len(options) <= 26
    if not (fit and all(isinstance(option, str | int | float) for option in options)):
        expected = "a list of 2 to 26 texts or numbers"
        raise UserError(f"{place}: the options are not a list of choices", got=repr(options)[:80], expected=expected)
    return "\n".join(f"{letter}. {option}" for letter, option in zip(ascii_uppercase, options, strict=False))


def right_letter(answer: Any, count: int, place: str) -> str:
    """The letter of the right one of `count` options, from that letter or the option's number from 0."""
    letters = ascii_uppercase[:count]
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < count:
        return letters[answer]
    if isinstance(answer, str) and len(answer.strip()) == 1 and answer.strip().upper() in letters:
        return answer.strip().upper()
    expected = f"a letter from A to {letters[-1]}, or the option's number from 0 to {count - 1}"
    raise UserError(f"{place}: the answer is none of the options", got=repr(answer)[:80], expected=expected)
