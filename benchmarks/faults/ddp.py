"""SIGKILL in a run of two processes (DDP): does the other one end, and is the continued run the uninterrupted one?

    python -m benchmarks.faults.ddp --n 6       # about 5 minutes of two cores

Both, the first or the second are killed in turn, at a random step.
"""

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.faults import compare, runs
from benchmarks.faults.table import Options, Row, run

PATIENCE = 60.0  # seconds that the other process may take to notice


def processes(pid: int) -> list[int]:
    """A command and the further ranks that it has started."""
    found = [pid]
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == pid and b"fit" in (folder / "cmdline").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:  # it has just ended
            continue
    return found


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def rows(path: Path) -> int:
    """Of a table, as far as it is written."""
    return len(path.read_bytes().splitlines()) - 1 if path.is_file() else 0


def ddp(options: Options) -> Iterator[Row]:
    """The harness."""
    rng = random.Random(options.seed)
    words = [*options.fit, "--trainer.devices=2", "--trainer.strategy=ddp"]
    assert runs.start([*words, "--runs", "whole"], "whole.log").wait() == 0, "see whole.log"
    whole = runs.newest("whole")
    steps = rows(whole / "metrics.csv") - 1
    for i in range(options.n or 0):
        own, whom = (
            [*words, "--runs", f"kill{i}"],
            ("both processes", "the first process", "the second process")[i % 3],
        )
        process, at = runs.start(own, f"kill{i}.log"), rng.randint(1, steps)
        while process.poll() is None and rows(runs.newest(f"kill{i}") / "metrics.csv") < at:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        ranks = processes(process.pid)
        victims = {"both processes": ranks, "the first process": ranks[:1], "the second process": ranks[1:]}[whom]
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        end = time.monotonic() + PATIENCE
        while any(map(alive, ranks)) and time.monotonic() < end:
            process.poll()  # collects it
            time.sleep(0.05)
        hang = [pid for pid in ranks if alive(pid)]
        for pid in hang:
            os.kill(pid, signal.SIGKILL)
        code = process.wait()
        resume = ["--ckpt_path", "last"] if compare.step(runs.newest(f"kill{i}")) is not None else []
        continued = runs.start([*own, *resume], f"kill{i}.again.log").wait()
        found = compare.differences(whole, runs.newest(f"kill{i}"))
        seen = f"exit {continued}" if continued else f"another {', '.join(found)}" if found else "the same"
        hung = f"the other still there after {PATIENCE:.0f} s; " if hang else "exit 0; " if code == 0 else ""
        yield Row(f"SIGKILL of {whom}", f"{hung}{seen}", not (hang or code == 0 or continued or found))


if __name__ == "__main__":
    run(ddp, n=6)
