r"""The process that compares formulas: `python -m rlif_lightning.grading.worker`.

It reads one JSON object a line and answers each with one. Formulas come from models and may be hostile:
they are only ever parsed as LaTeX, the process limits its own memory, and the other end kills it when an
answer takes too long. math-verify is imported here and nowhere else.
"""

import contextlib
import json
import logging
import os
import signal
import sys
import time
from functools import lru_cache
from typing import IO, Any

from rlif_lightning.grading.compare import Rule, equal
from rlif_lightning.grading.number import DECIMAL_PRECISION

MEMORY_BYTES = 2 * 1024**3
DIGITS = 30


def main() -> None:
    """Say that this worker is ready, then answer requests until the other end closes."""
    requests, answers = _own_pipes()
    with contextlib.suppress(ValueError, OSError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    _limit("RLIMIT_AS", MEMORY_BYTES)
    _limit("RLIMIT_CORE", 0)
    logging.disable(logging.CRITICAL)
    try:
        formulas_equal(r"\frac{1}{2}+x", "x+0.51", 0.0, 0.0)  # builds parser and caches once
    except ImportError as error:
        _send(answers, {"ready": False, "reason": str(error)})
        return
    _send(answers, {"ready": True})
    for line in requests:
        _send(answers, _answer(json.loads(line)))


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


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    # End by itself if an answer goes on long after its time, as when the parent was killed meanwhile.
    _limit("RLIMIT_CPU", int(time.process_time() + request["seconds"]) + 2)
    try:
        right = bool(equal(request["gold"], request["answer"], Rule(**request["rule"]), formulas_equal))
    except Exception as error:
        return {"id": request["id"], "right": False, "error": type(error).__name__}
    return {"id": request["id"], "right": right}


def _own_pipes() -> tuple[IO[str], IO[str]]:
    """Keep the pipes for the protocol and let everything else that prints or reads go nowhere."""
    requests = os.fdopen(os.dup(0), "r", encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    return requests, answers


def _send(answers: IO[str], message: dict[str, Any]) -> None:
    try:
        answers.write(json.dumps(message) + "\n")
        answers.flush()
    except BrokenPipeError:  # the parent is gone
        sys.exit(0)


def _limit(name: str, limit: int) -> None:
    """Lower a limit of this process, where its system has such limits (not Windows)."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        kind = getattr(resource, name)
        _, hard = resource.getrlimit(kind)
        resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


if __name__ == "__main__":
    main()
