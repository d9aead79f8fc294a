"""Whether two formulas in LaTeX are equal in value: math-verify reads them, and says what has no value.

The worker process alone imports sympy and math-verify, here.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from rlif_lightning.grading.number import DECIMAL_PRECISION

DIGITS = 30
POINTS = 5


def formulas_equal(gold: str, answer: str, absolute: float = 0.0, relative: float = 0.0) -> bool:
    """Compare two formulas; numbers in them may have the given differences."""
    wanted, given = _parsed(gold), _parsed(answer)
    return wanted is not None and given is not None and _same(wanted, given, absolute, relative)


@lru_cache(maxsize=1024)
def _parsed(formula: str) -> Any:
    """What a formula says in sympy, or None: letters are real, but next to the imaginary unit `i`."""
    from latex2sympy2_extended.math_normalization import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse
    from sympy import Basic, I, MatrixBase, MatrixExpr, Symbol

    # `clean` has taken the units away; math-verify would take 3t for three of something.
    reading = NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="none")
    config = LatexExtractionConfig(boxed_match_priority=-1, normalization_config=reading)
    text = f"${formula.replace('$', '')}$".replace("\n", " ")
    found = parse(text, [config], fallback_mode="no_fallback", parsing_timeout=None, raise_on_error=True)
    if not found or not isinstance(found[0], Basic | MatrixBase):
        return None
    letters = {x: I if x.name == "i" else Symbol(x.name) for x in found[0].atoms(Symbol) if x.is_real is False}
    value = found[0].xreplace(letters) if letters else found[0]
    return value.doit() if isinstance(value, MatrixExpr) else value


def _same(gold: Any, answer: Any, absolute: float = 0.0, relative: float = 0.0) -> bool:
    """Compare two objects of sympy, by their parts where they have some."""
    from math_verify import verify
    from sympy import Expr, FiniteSet, Interval, MatrixBase, Tuple

    def same(one: Any, other: Any) -> bool:
        return _same(one, other, absolute, relative)

    if _relations(gold) or _relations(answer):
        return _same_relation(gold, answer, same)
    if isinstance(gold, MatrixBase) and isinstance(answer, MatrixBase):
        return gold.shape == answer.shape and all(map(same, gold, answer))
    if isinstance(gold, Tuple) and isinstance(answer, Tuple):
        return len(gold) == len(answer) and all(map(same, gold, answer))
    if isinstance(gold, FiniteSet) and isinstance(answer, FiniteSet):
        return len(gold) == len(answer) and all(any(same(one, other) for other in answer) for one in gold)
    if isinstance(gold, Interval) and isinstance(answer, Interval):
        ends = gold.left_open == answer.left_open and gold.right_open == answer.right_open
        return ends and same(gold.start, answer.start) and same(gold.end, answer.end)
    if isinstance(gold, Expr) and isinstance(answer, Expr):
        equal = _same_value(gold, answer, absolute, relative)
        if equal or (equal is False and not (gold.is_Symbol or answer.is_Symbol)):  # a word may be one symbol
            return equal
    return bool(verify([gold], [answer], timeout_seconds=None, raise_on_error=True))


def _same_value(gold: Any, answer: Any, absolute: float, relative: float) -> bool | None:
    """Compare two expressions; None where one has no value, such as `f(x)` for an unknown f.

    math-verify rounds decimals to six places after the point, so it would take 1e-8 for 2e-8; decimals are compared
    by their relative difference, all other numbers exactly.
    """
    from sympy import Float, N

    rounded = gold.has(Float) or answer.has(Float)
    constant = not (gold.free_symbols or answer.free_symbols)
    if gold == answer:
        return True
    wanted, given = _exact(gold), _exact(answer)
    if constant and (rounded or absolute or relative):
        wanted, given = N(wanted, DIGITS), N(given, DIGITS)
        if not all(x.is_number and x.is_finite for x in (wanted, given)):
            return None
        relative = max(relative, float(DECIMAL_PRECISION)) if rounded else relative
        return bool(abs(wanted - given) <= max(absolute, relative * abs(wanted)))
    return _is_zero(wanted - given)


def _is_zero(expression: Any) -> bool | None:
    """Whether an expression is 0, as evaluated with up to 100 digits at some points of its letters; None: no value.

    What cancels has no significant digit left then, however small or large its terms are.
    """
    from sympy import Float

    letters = expression.free_symbols
    verdict = None
    for row in range(POINTS if letters else 1):
        parts = expression.evalf(DIGITS, subs=_point(letters, row)).as_real_imag()
        if all(part.is_finite for part in parts):
            if not all(part == 0 or isinstance(part, Float) for part in parts):
                return None
            if any(part != 0 and part._prec > 1 for part in parts):
                return False
            verdict = True
    return verdict


def _point(letters: Any, row: int) -> dict[Any, Any]:
    """One of the points at which formulas are compared: a fraction without a pattern for each letter."""
    from sympy import Rational

    names = sorted(letters, key=str)
    return {name: Rational(pow(7, 5 * row + 11 * k + 3, 1009) - 504, 61) for k, name in enumerate(names)}


def _exact(expression: Any) -> Any:
    """An expression evaluated, its decimals as the fractions that they are written as."""
    from sympy import Float, Rational

    return expression.xreplace({x: Rational(str(x)) for x in expression.atoms(Float)}).doit()


def _relations(statement: Any) -> list[Any]:
    """The equations or inequalities that a statement consists of, as `1 < x < 2` of two; empty for anything else."""
    from sympy import And
    from sympy.core.relational import Relational

    parts = statement.args if isinstance(statement, And) else [statement]
    return list(parts) if all(isinstance(part, Relational) for part in parts) else []


def _same_relation(gold: Any, answer: Any, same: Callable[[Any, Any], bool]) -> bool:
    """Compare two statements, or a statement with the set or the value that it says of its letter."""
    from latex2sympy2_extended import is_expr_of_only_symbols
    from sympy import Eq, Set

    wanted, given = _relations(gold), _relations(answer)
    if wanted and given:
        if len(wanted) == len(given) and all(any(_equivalent(x, y, same) for y in given) for x in wanted):
            return True
        letters = [set().union(*(x.free_symbols for x in parts)) for parts in (wanted, given)]
        sets = _solutions(wanted), _solutions(given)
        return letters[0] == letters[1] and None not in sets and same(*sets)
    parts, other = (wanted, answer) if wanted else (given, gold)
    if isinstance(other, Set):  # an answer that is still to be solved is none
        solved = wanted or all(x.lhs.is_Symbol or x.rhs.is_Symbol for x in given)
        return bool(solved) and (found := _solutions(parts)) is not None and same(other, found)
    left, right = parts[0].args
    if len(parts) > 1 or not isinstance(parts[0], Eq) or (wanted and not is_expr_of_only_symbols(left)):
        return False
    # x + y = 7 and 2 + 3 = 5 state a value, 1 = 1 and 1 = 2 do not
    return left != right and bool(parts[0].free_symbols or same(left, right)) and same(other, right)


def _equivalent(one: Any, other: Any, same: Callable[[Any, Any], bool]) -> bool:
    """Whether two relations have the same sides, or differences of their sides that are proportional."""
    from sympy import Expr

    one, other = (x.reversed if x.rel_op in (">", ">=") else x for x in (one, other))
    (left, right), (other_left, other_right) = one.args, other.args
    either_way = one.rel_op in ("==", "!=")
    if one.rel_op != other.rel_op:
        return False
    if same(left, other_left) and same(right, other_right):
        return True
    if either_way and same(left, other_right) and same(right, other_left):
        return True
    letters = one.free_symbols
    if not letters or letters != other.free_symbols or not all(isinstance(x, Expr) for x in one.args + other.args):
        return False
    differences = _exact(left - right), _exact(other_left - other_right)
    for row in range(POINTS):
        mine, others = (x.subs(_point(letters, row)) for x in differences)
        if _is_zero(mine) is False and _is_zero(others) is False:
            positive = either_way or (mine * others).is_positive
            return bool(positive and _is_zero(differences[0] * others - differences[1] * mine))
    return False


def _solutions(relations: list[Any]) -> Any:
    """The set that relations say of their one letter, or one equation of the first of its letters.

    None where they say nothing: no solution, every number, or nothing that sympy can solve for sure.
    """
    from sympy import And, EmptySet, Eq, FiniteSet, S, solve
    from sympy.functions.elementary.trigonometric import TrigonometricFunction

    letters = sorted(set().union(*(x.free_symbols for x in relations)), key=str)
    if not letters or any(x.has(TrigonometricFunction) for x in relations):
        return None
    try:
        if len(letters) == 1:
            found = And(*relations).as_set()
        else:
            solvable = len(relations) == 1 and isinstance(relations[0], Eq)
            found = FiniteSet(*solve(relations[0], letters[0])) if solvable else EmptySet
    except (NotImplementedError, TypeError, ValueError, AttributeError):
        return None
    return None if found in (S.EmptySet, S.UniversalSet, S.Reals) else found
