r"""The process that compares formulas: `python -m rlif_lightning.grading.worker`.

Its standard input is a socket, over which it answers JSON with JSON. Formulas come from models and may be hostile:
they are only ever parsed as LaTeX, the process limits its own memory, and the other end kills it when an answer
takes too long. math-verify is imported here and nowhere else.
"""

import contextlib
import json
import resource
import time
from functools import lru_cache
from multiprocessing.connection import Connection
from typing import Any

from rlif_lightning.grading.compare import Rule, equal
from rlif_lightning.grading.number import DECIMAL_PRECISION

MEMORY_BYTES = 2 * 1024**3
DIGITS = 30


def main() -> None:
    """Say that this worker is ready (null) or why not, then answer requests until the other end closes."""
    _limit(resource.RLIMIT_AS, MEMORY_BYTES)
    _limit(resource.RLIMIT_CORE, 0)
    with Connection(0) as parent, contextlib.suppress(EOFError, OSError):
        try:
            formulas_equal(r"\frac{1}{2}+x", "x+0.51", 0.0, 0.0)  # builds parser and caches once
        except ImportError as error:
            parent.send_bytes(json.dumps(str(error)).encode())
            return
        parent.send_bytes(b"null")
        while True:
            verdict = _answer(**json.loads(parent.recv_bytes()))
            parent.send_bytes(json.dumps(verdict).encode())


def formulas_equal(gold: str, answer: str, absolute: float, relative: float) -> bool:
    """Compare two formulas in LaTeX: by math-verify, and as numbers where one is a decimal or may differ.

    math-verify rounds decimals to six places after the point, so it would take 1e-8 for 2e-8; numbers are
    therefore compared here, with their allowed absolute and relative differences.
    """
    from math_verify import verify

    wanted, given = _parsed(gold), _parsed(answer)
    if not wanted or not given:
        return False
    near = _near(wanted[0], given[0], absolute, relative)
    if near is not None:
        return near
    return bool(verify(list(wanted), list(given), timeout_seconds=None, raise_on_error=True))


def _near(gold: Any, answer: Any, absolute: float, relative: float) -> bool | None:
    """Compare two numbers with their tolerance; None where they are no numbers or exact ones."""
    from sympy import Expr, Float, N

    if not all(isinstance(x, Expr) and not x.free_symbols for x in (gold, answer)):
        return None
    rounded = gold.has(Float) or answer.has(Float)
    if not (rounded or absolute or relative):
        return None
    wanted, given = N(gold.doit(), DIGITS), N(answer.doit(), DIGITS)
    if not all(x.is_number and x.is_finite for x in (wanted, given)):
        return None
    relative = max(relative, float(DECIMAL_PRECISION)) if rounded else relative
    return bool(abs(wanted - given) <= max(absolute, relative * abs(wanted)))


@lru_cache(maxsize=256)
def _parsed(formula: str) -> tuple[Any, ...]:
    from math_verify import LatexExtractionConfig, parse

    config = LatexExtractionConfig(boxed_match_priority=-1)
    text = f"${formula.replace('$', '')}$".replace("\n", " ")
    return tuple(parse(text, [config], fallback_mode="no_fallback", parsing_timeout=None, raise_on_error=True))


def _answer(gold: str, answer: str, rule: dict[str, Any], seconds: float) -> bool | None:
    """Whether the answer is right, or None where the comparison fails; short of memory, the process ends."""
    # End as well if an answer takes much longer than its time, as when the parent was killed meanwhile.
    _limit(resource.RLIMIT_CPU, int(time.process_time() + seconds) + 2)
    try:
        return bool(equal(gold, answer, Rule(**rule), formulas_equal))
    except MemoryError:
        raise
    except Exception:
        return None


def _limit(kind: int, limit: int) -> None:
    """Lower a limit of this process, where its system lets it."""
    with contextlib.suppress(ValueError, OSError):
        _, hard = resource.getrlimit(kind)
        resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


if __name__ == "__main__":
    main()
