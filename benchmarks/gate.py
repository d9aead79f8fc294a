"""The gate between two steps: a side waits here for its turn and says what the step before has cost."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from benchmarks.clock import cpu_seconds, memory_mb


class Gate:
    """Turns a training loop into steps that another process asks for, one at a time.

    Everything between two gates is counted, whoever does it: data loading, hooks, bookkeeping.

    Args:
        asks: A line per step to do.
        answers: A line of JSON per step done, after one for the side being ready.
    """

    def __init__(self, asks: TextIO, answers: TextIO) -> None:
        self.asks, self.answers = asks, answers
        self.facts: dict[str, Any] = {}
        self.start: tuple[float, float] | None = None
        self.excluded = 0.0

    def note(self, **facts: Any) -> None:
        """Say something about the current step; numbers add up."""
        for key, value in facts.items():
            old = self.facts.get(key)
            self.facts[key] = value if old is None else old and value if isinstance(value, bool) else old + value

    @contextmanager
    def excluding(self) -> Iterator[None]:
        """Our own checks, which no user pays for."""
        before = cpu_seconds()
        yield
        self.excluded += cpu_seconds() - before

    def arrive(self) -> None:
        """A step is about to begin: report the one before, wait for the turn."""
        self._report()
        self.asks.readline()
        self.start, self.excluded, self.facts = (cpu_seconds(), time.perf_counter()), 0.0, {}

    def finish(self) -> None:
        """The last step is done."""
        self._report()

    def _report(self) -> None:
        if self.start is not None:
            self.facts["cpu"] = cpu_seconds() - self.start[0] - self.excluded
            self.facts["wall"] = time.perf_counter() - self.start[1]
        report = {**self.facts, "rss_mb": memory_mb("VmRSS"), "peak_mb": memory_mb("VmHWM")}
        print(json.dumps(report), file=self.answers, flush=True)
