"""SIGKILL anywhere in a run, its ending included: is the continued run the uninterrupted one, bit by bit?

    python -m benchmarks.faults.kills --n 50        # about 10 minutes of one core

The kills go round the parts of a run: before, in or after one of the calls that the uninterrupted run made; one part
is the run as a whole, at any moment. Every fourth run is killed once more while it continues. For every 25 runs, one
dies while the toy is built.
"""

import atexit
import json
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.faults import compare, runs
from benchmarks.faults.runs import Calls, Run
from benchmarks.faults.table import Options, Row, run


@dataclass(frozen=True)
class Kill:
    """Told of a run's calls, it kills the run at one of them.

    Args:
        part: Of the call.
        nth: Its number.
        when: ``before``, ``in`` or ``after`` it.
        seconds: From its beginning, for ``in``.
    """

    part: str
    nth: int
    when: str
    seconds: float = 0.0

    def __call__(self, part: str, nth: int, ended: bool) -> None:
        """Count down, or die."""
        if (part, nth) != (self.part, self.nth):
            return
        if self.when == "in" and not ended:
            later(self.seconds)
        elif self.when == ("after" if ended else "before"):
            die()


def die() -> None:
    """As kill -9 does."""
    os.kill(os.getpid(), signal.SIGKILL)


def later(seconds: float) -> None:
    """Die in so many seconds, but for a run that has ended then."""
    timer = threading.Timer(seconds, die)
    timer.daemon = True
    timer.start()


def draw(rng: random.Random, part: str, calls: list[tuple[str, int, float]]) -> Kill:
    """At one of the calls of a part."""
    _, nth, seconds = rng.choice([call for call in calls if call[0] == part])
    return Kill(part, nth, "in" if part == "run" else rng.choice(("before", "in", "after")), rng.uniform(0, seconds))


def write_calls(calls: Calls) -> None:
    """At a run's end."""
    atexit.register(lambda: Path("calls.json").write_text(json.dumps(calls.made)))


def kills(options: Options) -> Iterator[Row]:
    """The harness."""
    rng = random.Random(options.seed)
    start = time.monotonic()
    assert Run([*options.fit, "--runs", "whole"], "whole.log", prepare=write_calls).wait().code == 0, "see whole.log"
    whole, duration = runs.newest("whole"), time.monotonic() - start
    if not options.tiny:
        runs.start([*options.fit, "--runs", "twin"], "twin.log").wait()
        found = compare.differences(whole, runs.newest("twin"))
        yield Row("nothing: the same command, not forked", ", ".join(found) or "the same", not found)
    calls = [*json.loads(Path("calls.json").read_text()), ("run", 1, duration)]
    parts = sorted({part for part, _, _ in calls})
    rng.shuffle(parts)
    for i in range(options.n or 0):
        words = [*options.fit, "--runs", f"kill{i}"]
        killed = Run(words, f"kill{i}.log", draw(rng, parts[i % len(parts)], calls)).wait()
        where = killed.calls.now if killed.code < 0 else "nothing: it ended before"
        if i % 4 == 3 and compare.step(runs.newest(f"kill{i}")) is not None:
            runs.again(killed, f"kill{i}.second.log", draw(rng, "run", calls))
            where += ", and once more while it continued"
        continued = runs.again(killed, f"kill{i}.again.log")
        yield Row(f"SIGKILL in {where}", *compare.outcome(whole, continued, runs.newest(f"kill{i}")))
    for i in range(0 if options.tiny else (options.n or 0) // 25):
        cache, words = str(Path(f"cache{i}").absolute()), [*options.fit, "--runs", f"build{i}"]
        killed = Run(words, f"build{i}.log", Kill("toy", 1, "in", rng.uniform(0, 20)), RLIF_CACHE=cache).wait()
        continued = runs.again(killed, f"build{i}.again.log", RLIF_CACHE=cache)
        yield Row("SIGKILL while the toy is built", *compare.outcome(whole, continued, runs.newest(f"build{i}")))


if __name__ == "__main__":
    run(kills, n=50)
