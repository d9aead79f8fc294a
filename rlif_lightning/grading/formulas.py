"""Whether two formulas in LaTeX are equal in value: math-verify reads them, and says what has no value.

The worker process alone imports this module, and with it sympy and math-verify.
"""

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import sympy
from latex2sympy2_extended import is_expr_of_only_symbols
from latex2sympy2_extended.math_normalization import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify
from sympy.core.relational import Relational
from sympy.functions.elementary.trigonometric import TrigonometricFunction

from rlif_lightning.grading.number import DECIMAL_PRECISION

DIGITS = 30
POINTS = 5
NOISE = 20  # bits of accuracy
MAX_DEGREE = 8  # of an equation that is solved
# `clean` has taken the units away; math-verify would take 3t for three of something.
_NORMALIZATION = NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="none")
_READING = [LatexExtractionConfig(boxed_match_priority=-1, normalization_config=_NORMALIZATION)]


def formulas_equal(gold: str, answer: str, absolute: float = 0.0, relative: float = 0.0) -> bool:
    """Compare two formulas; numbers in them may have the given differences."""
    wanted, given = _parsed(gold), _parsed(answer)
    return wanted is not None and given is not None and _same(wanted, given, absolute, relative)


@lru_cache(maxsize=1024)
def _parsed(formula: str) -> Any:
    """What a formula says in sympy, or None: letters are real, but next to the imaginary unit `i`."""
    text = f"${formula.replace('$', '')}$".replace("\n", " ")
    found = parse(text, _READING, fallback_mode="no_fallback", parsing_timeout=None, raise_on_error=True)
    if not found or not isinstance(found[0], sympy.Basic | sympy.MatrixBase):
        return None
    letters = {x: sympy.I if x.name == "i" else sympy.Symbol(x.name) for x in found[0].atoms(sympy.Symbol)}
    is_real = all(x.is_real and x.name != "i" for x in letters)
    value = found[0] if is_real else found[0].xreplace(letters)
    return value.doit() if isinstance(value, sympy.MatrixExpr) else value


def _same(gold: Any, answer: Any, absolute: float = 0.0, relative: float = 0.0) -> bool:
    """Compare two objects of sympy, by their parts where they have some."""

    def same(one: Any, other: Any) -> bool:
        return _same(one, other, absolute, relative)

    def both(kind: type) -> bool:
        return isinstance(gold, kind) and isinstance(answer, kind)

    gold, answer = (
        x.args[0] if isinstance(x, sympy.FiniteSet) and len(x) == 1 and _relations(x.args[0]) else x
        for x in (gold, answer)
    )
    if _relations(gold) or _relations(answer):
        return _same_relation(gold, answer, same)
    if both(sympy.MatrixBase):
        return gold.shape == answer.shape and all(map(same, gold, answer))
    if both(sympy.Tuple):
        return len(gold) == len(answer) and all(map(same, gold, answer))
    if both(sympy.FiniteSet):
        return len(gold) == len(answer) and all(any(same(one, other) for other in answer) for one in gold)
    if both(sympy.Interval):
        ends = gold.left_open == answer.left_open and gold.right_open == answer.right_open
        return ends and same(gold.start, answer.start) and same(gold.end, answer.end)
    if _is_value(gold) and _is_value(answer):
        equal = _same_value(gold, answer, absolute, relative)
        if equal or (equal is False and not (gold.is_Symbol or answer.is_Symbol)):  # a word may be one symbol
            return equal
    return bool(verify([gold], [answer], timeout_seconds=None, raise_on_error=True))


def _is_value(thing: Any) -> bool:
    return isinstance(thing, sympy.Expr) and not isinstance(thing, sympy.MatrixBase | sympy.MatrixExpr)


def _same_value(gold: Any, answer: Any, absolute: float, relative: float) -> bool | None:
    """Compare two expressions; None where one has no value, such as `f(x)` for an unknown f.

    math-verify rounds decimals to six places after the point, so it would take 1e-8 for 2e-8; decimals are compared
    by their relative difference, all other numbers exactly.
    """
    if gold == answer:
        return True
    rounded = gold.has(sympy.Float) or answer.has(sympy.Float)
    wanted, given = _exact(gold), _exact(answer)
    if (rounded or absolute or relative) and not (gold.free_symbols or answer.free_symbols):
        wanted, given = sympy.N(wanted, DIGITS), sympy.N(given, DIGITS)
        if not all(x.is_number and x.is_finite for x in (wanted, given)):
            return None
        relative = max(relative, float(DECIMAL_PRECISION)) if rounded else relative
        return bool(abs(wanted - given) <= max(absolute, relative * abs(wanted)))
    return _is_zero(wanted - given)


def _exact(expression: Any) -> Any:
    """An expression evaluated, its decimals as the fractions that they are written as."""
    return expression.xreplace({x: sympy.Rational(str(x)) for x in expression.atoms(sympy.Float)}).doit()


def _is_zero(expression: Any) -> bool | None:
    """Whether an expression is 0, as evaluated with up to 100 digits at some points of its letters; None: no value.

    What cancels has no significant digit left then, however small or large its terms are.
    """
    verdict = None
    for row in range(POINTS if expression.free_symbols else 1):
        parts = expression.evalf(DIGITS, subs=_point(expression.free_symbols, row)).as_real_imag()
        if all(part.is_finite for part in parts):
            if not all(part == 0 or isinstance(part, sympy.Float) for part in parts):
                return None
            if any(part != 0 and part._prec > NOISE for part in parts):
                return False
            verdict = True
    return verdict


def _point(letters: Iterable[Any], row: int) -> dict[Any, Any]:
    """One of the points at which formulas are compared: a fraction without a pattern for each letter."""
    names = sorted(letters, key=str)
    return {name: sympy.Rational(pow(7, 5 * row + 11 * k + 3, 1009) - 504, 61) for k, name in enumerate(names)}


def _relations(statement: Any) -> tuple[Any, ...]:
    """The equations or inequalities that a statement consists of, as `1 < x < 2` of two; empty for anything else.

    Of a chain `a = b = c` the ends count.
    """
    is_chain = isinstance(statement, sympy.And)
    parts = tuple(getattr(statement, "_unsorted_args", statement.args)) if is_chain else (statement,)
    if not all(isinstance(part, Relational) for part in parts):
        return ()
    if len(parts) > 1 and all(part.rel_op == "==" for part in parts):
        return (sympy.Eq(parts[0].lhs, parts[-1].rhs, evaluate=False),)
    return parts


def _letters(parts: Iterable[Any]) -> set[Any]:
    return set().union(*(part.free_symbols for part in parts))


def _same_relation(gold: Any, answer: Any, same: Callable[[Any, Any], bool]) -> bool:
    """Compare two statements, or a statement with the set or the value that it says of its letter."""
    wanted, given = _relations(gold), _relations(answer)
    if wanted and given:
        if len(wanted) == len(given) and all(any(_equivalent(x, y, same) for y in given) for x in wanted):
            return True
        if _letters(wanted) != _letters(given) or (found := _solutions(wanted)) is None:
            return False
        return (others := _solutions(given)) is not None and same(found, others)
    parts, other = (wanted, answer) if wanted else (given, gold)
    if isinstance(other, sympy.Set):  # an answer that is still to be solved is none
        solved = wanted or all(x.lhs.is_Symbol or x.rhs.is_Symbol for x in given)
        return bool(solved) and (found := _solutions(parts)) is not None and same(other, found)
    # x + y = 7 and 2 + 3 = 5 state a value; 1 = 1, 1 = 2, 1 = x do not, nor 2x = 4 where it is the right answer.
    left, right = parts[0].args
    states = (left.free_symbols and (not wanted or is_expr_of_only_symbols(left))) or same(left, right)
    return bool(states) and len(parts) == 1 and parts[0].rel_op == "==" and left != right and same(other, right)


def _equivalent(one: Any, other: Any, same: Callable[[Any, Any], bool]) -> bool:
    """Whether two relations have the same sides, or differences of their sides that are proportional."""
    one, other = (x.reversed if x.rel_op in (">", ">=") else x for x in (one, other))
    if one.rel_op != other.rel_op:
        return False
    (left, right), (other_left, other_right) = one.args, other.args
    either_way = one.rel_op in ("==", "!=")
    if (same(left, other_left) and same(right, other_right)) or (
        either_way and same(left, other_right) and same(right, other_left)
    ):
        return True
    letters = one.free_symbols
    if not all(map(_is_value, one.args + other.args)) or letters != other.free_symbols:
        return False
    difference, other_difference = _exact(left - right), _exact(other_left - other_right)
    for row in range(POINTS) if letters else ():
        scale, other_scale = (x.subs(_point(letters, row)) for x in (difference, other_difference))
        if _is_zero(scale) is False and _is_zero(other_scale) is False:
            same_side = either_way or (scale * other_scale).is_positive
            return bool(same_side and _is_zero(difference * other_scale - other_difference * scale))
    return False


def _solutions(relations: tuple[Any, ...]) -> Any:
    """The set that relations say of their one letter, or one equation of the first of its letters.

    None where they say nothing: no solution, every number, or nothing that sympy can solve for sure.
    """
    letters = sorted(_letters(relations), key=str)
    high = any(power.exp.is_number and abs(power.exp) > MAX_DEGREE for x in relations for power in x.atoms(sympy.Pow))
    if not letters or high or any(x.has(TrigonometricFunction) for x in relations):
        return None
    try:
        if len(letters) == 1:
            found = sympy.And(*relations).as_set()
        elif len(relations) == 1 and relations[0].rel_op == "==":
            found = sympy.FiniteSet(*sympy.solve(relations[0], letters[0]))
        else:
            return None
    except (NotImplementedError, TypeError, ValueError, AttributeError):
        return None
    return None if found in (sympy.S.EmptySet, sympy.S.UniversalSet, sympy.S.Reals) else found
