"""Python literals in texts, compared by value and never evaluated.

Texts are a model's own words and may be hostile. What reaches Python's parser is a literal by its letters already:
strings, numbers, True, False, None, brackets, commas and colons, not long and not deep.
"""

import ast
import re
import warnings
from collections.abc import Iterator
from itertools import islice
from typing import Any

MAX_LITERAL = 10_000  # longer literals are not read; those of CRUXEval have at most some dozen characters
MAX_DEPTH = 50
MAX_PLACES = 64  # so many `==`, and so many other marks, are tried in one text
_STRING = (
    r"(?:[bB][rR]?|[rR][bB]?|[uU])?"  # no f: it holds code
    r"(?:'''(?:[^\\]|\\.)*?'''|" + r'"""(?:[^\\]|\\.)*?"""' + r"|'(?:[^'\\\n]|\\.)*'|" + r'"(?:[^"\\\n]|\\.)*")'
)
_DECIMAL = r"(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
_REAL = rf"(?:0[xX][0-9a-fA-F_]+|0[oO][0-7_]+|0[bB][01_]+|{_DECIMAL})"
_TOKEN = re.compile(
    rf"(?P<string>{_STRING})"
    rf"|(?P<value>[-+]?\s?{_REAL}(?:[jJ]|\s?[-+]\s?{_REAL}[jJ])?(?![0-9A-Za-z_.])"
    r"|(?:True|False|None)(?![0-9A-Za-z_])|set\(\s?\))"
    r"|(?P<open>[\[({])|(?P<close>[\])}])|(?P<colon>:)|(?P<comma>,)|(?P<space>\s+)",
    re.DOTALL,
)
_MARK = re.compile(r"==|->|[:=]|\b(?:is|be|answer|output|result|returns?)\b", re.IGNORECASE)
_AROUND = "`*$ \t\r\n"
_OPEN, _CLOSE = "[ANSWER]", "[/ANSWER]"


def read_literal(text: str) -> tuple[Any, ...]:
    """The one value of a literal; empty where a text is none, or longer or deeper than any honest one."""
    text = text.strip()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "\d" is read as Python reads it, with a warning
            return (ast.literal_eval(text),) if _looks_literal(text) else ()
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError, OverflowError):
        return ()


def same_literal(gold: str, answer: str) -> bool:
    """Whether ``assert gold == answer`` would hold: 1 equals 1.0 and True, [1] does not equal (1,)."""
    wanted = read_literal(gold)
    return bool(wanted) and wanted == read_literal(answer)


def canonical_literal(text: str) -> str | None:
    """One text for all literals of equal value, by which answers can be grouped; None for what is no literal."""
    try:
        return next(map(_canonical, read_literal(text)), None)
    except ValueError:  # an integer too long to be written
        return None


def find_literal(text: str) -> tuple[int, int] | None:
    """Where the literal stands that a text gives as its answer.

    It stands between ``[ANSWER]`` and ``[/ANSWER]``, in the first such pair that holds one: what a model writes on
    after its answer does not count. Without such a pair it stands in the last line. There it is all of the text, or
    all that follows a ``==``, as in ``assert f(2) == 4``, or a mark such as ``=``, ``:`` or ``is``.
    """
    begin = 0
    for close in islice(re.finditer(re.escape(_CLOSE), text), MAX_PLACES):
        mark = text.rfind(_OPEN, begin, close.start())
        if mark >= 0 and (found := _answer_in(text, mark + len(_OPEN), close.start())):
            return found
        begin = close.end()
    mark = text.rfind(_OPEN, begin)
    return _answer_in(text, mark + len(_OPEN), len(text)) if mark >= 0 else _answer_in(text, *_last_line(text))


def _last_line(text: str) -> tuple[int, int]:
    """Where the last line with an answer's letters begins and ends; (0, 0) where there is none."""
    end = len(text)
    for line in reversed(text[-2 * MAX_LITERAL :].splitlines(keepends=True)):
        begin, inside = end - len(line), line.splitlines()[0]
        if inside.strip(_AROUND):
            return begin, begin + len(inside)
        end = begin
    return 0, 0


def _answer_in(text: str, begin: int, end: int) -> tuple[int, int] | None:
    inside = text[begin : min(end, begin + 2 * MAX_LITERAL)]
    for start in _starts(inside):
        answer = inside[start:].lstrip(_AROUND)
        place = begin + len(inside) - len(answer)
        answer = answer.rstrip(_AROUND)
        for form in (answer, answer.removesuffix(".").rstrip(_AROUND)):
            if read_literal(form):
                return place, place + len(form)
    return None


def _starts(text: str) -> Iterator[int]:
    """At the beginning; after each ``==``, which may also stand inside a string; after other marks."""
    fence = re.match(r"\s*```[a-zA-Z]*\n", text)
    first = fence.end() if fence else 0
    yield first
    marks = list(_MARK.finditer(text, first))
    for wanted in (True, False):
        yield from [mark.end() for mark in marks if (mark.group() == "==") is wanted][-MAX_PLACES:]


def _looks_literal(text: str) -> bool:
    """Whether a text has the letters of a literal: linear in its length, and all that the parser needs to be safe."""
    if len(text) > MAX_LITERAL or "\0" in text:
        return False
    place, depth, after = 0, 0, ""
    while token := _TOKEN.match(text, place):
        place, kind = token.end(), str(token.lastgroup)
        begins = kind in ("string", "value", "open")
        if begins and after not in ("", "open", "colon", "comma") and (kind, after) != ("string", "string"):
            return False  # 1 -2 -3 -4 or [0][0][0]: a tree as deep as the text is long
        depth += (kind == "open") - (kind == "close")
        if not 0 <= depth <= MAX_DEPTH or (kind == "colon" and not depth):
            return False
        after = after if kind == "space" else kind
    return bool(text) and place == len(text) and not depth


def _canonical(value: Any) -> str:
    if isinstance(value, complex) and not value.imag:
        value = value.real
    if isinstance(value, bool) or (isinstance(value, float) and value.is_integer()):
        value = int(value)
    if isinstance(value, list | tuple):
        inside = ", ".join(_canonical(part) for part in value)
        return f"[{inside}]" if isinstance(value, list) else f"({inside},)"
    if isinstance(value, set):
        return "{" + ", ".join(sorted(_canonical(part) for part in value)) + "}" if value else "set()"
    if isinstance(value, dict):
        return "{" + ", ".join(sorted(f"{_canonical(k)}: {_canonical(v)}" for k, v in value.items())) + "}"
    return repr(value)
