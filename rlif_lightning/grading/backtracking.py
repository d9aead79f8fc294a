"""Patterns that can take exponential time, found by looking at the pattern alone."""

import warnings
from collections.abc import Iterator
from typing import Any

MANY = 50
"""A repeat with a smaller upper bound counts as bounded."""


def can_explode(where: str) -> bool:
    """Whether a repeat holds a repeat with nothing fixed between two rounds, as in (a+)+ or (a*b?)*.

    This sees the usual form of exponential backtracking, not every one (overlapping alternatives pass).

    Args:
        where: A valid regular expression.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            import sre_parse
        except ImportError:  # a later Python: the window alone then bounds the search
            return False
        tree = sre_parse.parse(where)
    return any(_repeat_of_repeat(op, argument) for op, argument in _nodes(tree))


def _nodes(tree: Any) -> Iterator[tuple[Any, Any]]:
    """All (op, argument) pairs of a parsed pattern, its groups and branches included."""
    for op, argument in tree:
        yield op, argument
        for part in argument if isinstance(argument, list | tuple) else ():
            for inner in part if isinstance(part, list) else (part,):
                if type(inner).__name__ == "SubPattern":
                    yield from _nodes(inner)


def _repeat_of_repeat(op: Any, argument: Any) -> bool:
    if str(op) not in ("MAX_REPEAT", "MIN_REPEAT") or argument[1] < MANY:
        return False
    body = list(_flat(argument[2]))
    inner = any(str(o) in ("MAX_REPEAT", "MIN_REPEAT") and a[1] >= MANY for o, a in _nodes(argument[2]))
    fixed = any(str(o) == "LITERAL" for o, _ in body)
    return inner and not fixed


def _flat(tree: Any) -> Iterator[tuple[Any, Any]]:
    """The items of a sequence, plain groups opened."""
    for op, argument in tree:
        if str(op) == "SUBPATTERN":
            yield from _flat(argument[-1])
        else:
            yield op, argument
