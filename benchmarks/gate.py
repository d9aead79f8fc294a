"""The gate between two steps: a side waits here for its turn and says what the step before has cost."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

import torch

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
        self.start: list[float] | None = None
        self.excluded = [0.0, 0.0]  # CPU and wall seconds

    def note(self, **facts: Any) -> None:
        """Say something about the current step; numbers add up."""
        for key, value in facts.items():
            old = self.facts.get(key)
            self.facts[key] = value if old is None else old and value if isinstance(value, bool) else old + value

    @contextmanager
    def excluding(self) -> Iterator[None]:
        """Our own checks, which no user pays for."""
        before = _now()
        yield
        self.excluded = [sum(x) for x in zip(self.excluded, _since(before), strict=True)]

    def arrive(self) -> None:
        """A step is about to begin: report the one before, wait for the turn."""
        self._report()
        self.asks.readline()
        self.start, self.excluded, self.facts = _now(), [0.0, 0.0], {}

    def finish(self) -> None:
        """The last step is done."""
        self._report()

    def _report(self) -> None:
        if self.start is not None:
            spent = zip(("cpu", "wall"), _since(self.start), self.excluded, strict=True)
            self.facts |= {name: seconds - excluded for name, seconds, excluded in spent}
        report = {**self.facts, "rss_mb": memory_mb("VmRSS"), "peak_mb": memory_mb("VmHWM")}
        if torch.cuda.is_initialized():
            report["gpu_peak_mb"] = torch.cuda.max_memory_allocated() / 2**20
        print(json.dumps(report), file=self.answers, flush=True)


def _now() -> list[float]:
    """CPU and wall seconds, when all work given to a GPU is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return [cpu_seconds(), time.perf_counter()]


def _since(start: list[float]) -> list[float]:
    return [now - then for now, then in zip(_now(), start, strict=True)]
