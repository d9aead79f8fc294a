"""SIGKILL in a run of two processes (DDP): does the other one end, and is the continued run the uninterrupted one?

    python -m benchmarks.faults.ddp --n 6       # about 5 minutes of two cores

Both, the first or the second are killed in turn, at a random step.
"""

import contextlib
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.faults import compare, runs
from benchmarks.faults.table import Options, Row, run

PATIENCE = 60.0  # seconds that the other process may take to notice


def rows(path: Path) -> int:
    """Of a table, as far as it is written."""
    return len(path.read_bytes().splitlines()) - 1 if path.is_file() else 0


def kill(pids: list[int]) -> None:
    """Those that still run."""
    for pid in filter(runs.alive, pids):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def ddp(options: Options) -> Iterator[Row]:
    """The harness."""
    rng = random.Random(options.seed)
    words = [*options.fit, "--trainer.devices=2", "--trainer.strategy=ddp"]
    assert runs.start([*words, "--runs", "whole"], "whole.log").wait() == 0, "see whole.log"
    whole = runs.newest("whole")
    steps = rows(whole / "metrics.csv") - 1
    for i in range(options.n or 0):
        own, at = [*words, "--runs", f"kill{i}"], rng.randint(1, steps)
        process = runs.start(own, f"kill{i}.log")
        while process.poll() is None and rows(runs.newest(f"kill{i}") / "metrics.csv") < at:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        ranks = [process.pid, *runs.children(process.pid, b"fit")]
        whom, victims = [("both", ranks), ("the first", ranks[:1]), ("the second", ranks[1:])][i % 3]
        late = process.poll() is not None
        kill(victims)
        end = time.monotonic() + PATIENCE
        while any(map(runs.alive, ranks)) and time.monotonic() < end:
            process.poll()  # collects it
            time.sleep(0.05)
        hang = [pid for pid in ranks if runs.alive(pid)]
        kill(hang)
        code = process.wait()
        resume = ["--ckpt_path", "last"] if compare.step(runs.newest(f"kill{i}")) is not None else []
        continued = runs.start([*own, *resume], f"kill{i}.again.log").wait()
        found = compare.differences(whole, runs.newest(f"kill{i}"))
        seen = f"exit {continued}" if continued else f"another {', '.join(found)}" if found else "the same"
        first = "exit 0; " if code == 0 else ""
        first = f"the other still there after {PATIENCE:.0f} s; " if hang else first
        right = not (first or continued or found)
        yield Row(
            f"SIGKILL of {whom} of two{', too late' if late else ''}", f"{first}{seen}", None if late else right
        )


if __name__ == "__main__":
    run(ddp, n=6)
