r"""The process that compares formulas: `python -m rlif_lightning.grading.worker`.

Its standard input is a socket, over which it answers JSON with JSON. Formulas come from models and may be hostile:
they are only ever parsed as LaTeX, the process limits its own memory, and the other end kills it when an answer
takes too long.
"""

import contextlib
import json
import time
from multiprocessing.connection import Connection
from typing import Any

MISSING: str | None = None
try:
    from rlif_lightning.grading.formulas import formulas_equal
except ImportError as error:
    MISSING = str(error)

MEMORY_BYTES = 2 * 1024**3


def main() -> None:
    """Say that this worker is ready (null) or why not, then answer requests until the other end closes."""
    _limit("RLIMIT_AS", MEMORY_BYTES)
    _limit("RLIMIT_CORE", 0)
    with Connection(0) as parent, contextlib.suppress(EOFError, OSError):
        if not MISSING:
            formulas_equal(r"\frac{1}{2}+x", "x+0.51")  # builds parser and caches once
        parent.send_bytes(json.dumps(MISSING).encode())
        while True:
            verdict = _answer(*json.loads(parent.recv_bytes()))
            parent.send_bytes(json.dumps(verdict).encode())


def _answer(seconds: float, *question: Any) -> bool | None:
    """Whether two formulas are equal, or None where the comparison fails; short of memory, the process ends."""
    # End as well if an answer takes much longer than its time, as when the parent was killed meanwhile.
    _limit("RLIMIT_CPU", int(time.process_time() + seconds) + 2)
    try:
        return formulas_equal(*question)
    except MemoryError:
        raise
    except Exception:
        return None


def _limit(name: str, limit: int) -> None:
    """Lower a limit of this process, where its system has it and lets it."""
    with contextlib.suppress(ImportError, AttributeError, ValueError, OSError):
        import resource

        kind = getattr(resource, name)
        _, hard = resource.getrlimit(kind)
        resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


if __name__ == "__main__":
    main()
