"""Whether two formulas in LaTeX are equal in value: math-verify reads them, and says what has no value.

The worker process alone imports this module, and with it sympy and math-verify.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any

import sympy
from latex2sympy2_extended import is_expr_of_only_symbols
from latex2sympy2_extended.math_normalization import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify
from sympy.core.relational import Relational
from sympy.functions.elementary.trigonometric import TrigonometricFunction
from sympy.logic.boolalg import BooleanFunction

from rlif_lightning.grading.number import DECIMAL_PRECISION

DIGITS = 30
POINTS = 5
NOISE = 20  # bits of accuracy
MAX_DEGREE = 8  # of an equation that is solved
# `clean` has taken the units away; math-verify would take 3t for three of something.
_NORMALIZATION = NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="none")
_READING = [LatexExtractionConfig(boxed_match_priority=-1, normalization_config=_NORMALIZATION)]
_JOINED = tuple(
    (re.compile(rf"\\(?:text|mathrm|mbox)\s*\{{\s*{word}\s*\}}|(?<![A-Za-z\\]){word}(?![A-Za-z]){signs}"), kind)
    for word, signs, kind in (
        ("or", r"|\\(?:cup|lor|vee)(?![A-Za-z])", sympy.Or),
        ("and", r"|\\(?:cap|land|wedge)(?![A-Za-z])", sympy.And),
    )
)
_UNEQUAL = re.compile(r"[<>]|\\[lgn]eq(?![A-Za-z])")
_LETTERS = re.compile(r"\\mathbb\s*\{[A-Z]\}|\\[A-Za-z]+|[A-Za-z]'*")
_PRIMES = re.compile(r"\^\s*(?:\{\s*(?:\\prime\s*)+\}|\\prime(?![A-Za-z]))")
_SPARE = "qwuvzjhgkplmnosrtyabcfx"
_MIXED = re.compile(r"(?<![0-9.^_}])([0-9]+)\\frac\{([0-9]+)\}\{([0-9]+)\}")


def formulas_equal(gold: str, answer: str, absolute: float = 0.0, relative: float = 0.0) -> bool:
    """Compare two formulas; numbers in them may have the given differences."""
    wanted, given = map(_parsed, _one_case(gold, answer))
    return wanted is not None and given is not None and _same(wanted, given, absolute, relative)


def _one_case(*formulas: str) -> Iterable[str]:
    """The formulas with other letters for those with primes, and for capitals next to their small letters.

    math-verify reads all letters as small ones and drops primes: it would take `R-r` and `y-y'` for 0.
    """
    formulas = tuple(_PRIMES.sub(lambda match: "'" * match[0].count("prime"), formula) for formula in formulas)
    letters = [set(_LETTERS.findall(formula)) for formula in formulas]
    mixed = sorted({x for found in letters for x in found if "'" in x or (x.isupper() and x.lower() in found)})
    spare = [x for x in _SPARE if not any({x, x.upper()} & {y[0] for y in found} for found in letters)]
    names = dict(zip(mixed, spare, strict=False))
    return (_LETTERS.sub(lambda match: names.get(match[0], match[0]), formula) for formula in formulas)


@lru_cache(maxsize=1024)
def _parsed(formula: str) -> Any:
    """What a formula says in sympy, or None: letters are real, but next to the imaginary unit `i`."""
    for word, kind in _JOINED:
        parts = word.split(formula)
        if len(parts) > 1 and all(map(_UNEQUAL.search, parts)) and all(map(_relations, map(_parsed, parts))):
            return kind(*map(_parsed, parts), evaluate=False)
    first, *rest = formula.split("=")
    if len(rest) > 1 and first.strip() == rest[-1].strip():
        return None  # math-verify would read 1 = 0 = 1 as 1
    formula = _MIXED.sub(r"(\1+\\frac{\2}{\3})", formula)
    text = f"${formula.replace('$', '')}$".replace("\n", " ")
    found = parse(text, _READING, fallback_mode="no_fallback", parsing_timeout=None, raise_on_error=True)
    if not found or not isinstance(found[0], sympy.Basic | sympy.MatrixBase):
        return None
    letters = {x: sympy.I if x.name == "i" else sympy.Symbol(x.name) for x in found[0].atoms(sympy.Symbol)}
    is_real = all(x.is_real and x.name != "i" for x in letters)
    value = found[0] if is_real else found[0].xreplace(letters)
    # dy/dx of a letter is not 0, which it would be if the letter were a constant.
    unknown = [x for x in value.atoms(sympy.Derivative) if x.expr.is_Symbol]
    value = value.xreplace({x: sympy.Symbol(str(x), real=True) for x in unknown})
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
    if isinstance(gold, sympy.FiniteSet) != isinstance(answer, sympy.FiniteSet) and _paired(
        gold.args, answer.args, same
    ):
        return True  # of inequalities: `x<1, x>2` does not say how they are joined
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
        rounding = float(DECIMAL_PRECISION) * max(abs(wanted), abs(given)) if rounded else 0.0
        return bool(abs(wanted - given) <= max(absolute, relative * abs(wanted), rounding))
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

    Of a chain `a = b = c` the ends count; `x < 1 or x > 2` is one statement.
    """
    if isinstance(statement, sympy.And):
        parts = tuple(getattr(statement, "_unsorted_args", statement.args))
        if all(isinstance(part, sympy.Eq) for part in parts):
            return (sympy.Eq(parts[0].lhs, parts[-1].rhs, evaluate=False),)
        relations = [_relations(part) for part in parts]
        return tuple(chain(*relations)) if all(relations) else ()
    return (statement,) if isinstance(statement, Relational | sympy.Or) else ()


def _letters(parts: Iterable[Any]) -> set[Any]:
    return set().union(*(part.free_symbols for part in parts))


def _same_relation(gold: Any, answer: Any, same: Callable[[Any, Any], bool]) -> bool:
    """Compare two statements, or a statement with the set or the value that it says of its letter."""
    wanted, given = _relations(gold), _relations(answer)
    if wanted and given:
        if _paired(wanted, given, same):
            return True
        if _letters(wanted) != _letters(given) or (found := _solutions(wanted)) is None:
            return False
        return (others := _solutions(given)) is not None and same(found, others)
    parts, other = (wanted, answer) if wanted else (given, gold)
    if isinstance(other, sympy.Set):  # an answer that is still to be solved is none
        solved = wanted or all(x.lhs.is_Symbol or x.rhs.is_Symbol for part in given for x in part.atoms(Relational))
        return bool(solved) and (found := _solutions(parts)) is not None and same(other, found)
    if len(parts) > 1 or not isinstance(parts[0], sympy.Eq):
        return False
    # x + y = 7 and 2 + 3 = 5 state a value; 1 = 1, 1 = 2, 1 = x, x + 1 = x do not, nor 2x = 4 as the right answer.
    left, right = parts[0].args
    if left == right or (left.is_Number and right.is_Number):
        return False
    own = left.free_symbols - right.free_symbols
    states = (own and (not wanted or is_expr_of_only_symbols(left))) or same(left, right)
    return bool(states) and same(other, right)


def _paired(some: Sequence[Any], others: Sequence[Any], same: Callable[[Any, Any], bool]) -> bool:
    return len(some) == len(others) and all(any(_equivalent(x, y, same) for y in others) for x in some)


def _equivalent(one: Any, other: Any, same: Callable[[Any, Any], bool]) -> bool:
    """Whether two relations have the same sides, or differences of their sides that are proportional.

    The differences must have values that vary: 1 and 2 are those of `x + 1 = x` and `x + 2 = x`, which say nothing.
    """
    if not (isinstance(one, Relational) and isinstance(other, Relational)):
        joined = isinstance(one, BooleanFunction) and type(one) is type(other)
        return joined and _paired(one.args, other.args, same)
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
            varies = _is_zero(difference - scale) is False and _is_zero(other_difference - other_scale) is False
            return bool(same_side and varies and _is_zero(difference * other_scale - other_difference * scale))
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
