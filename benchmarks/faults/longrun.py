"""A long run: do memory, open files, threads and the time of a step stay where they were?

    python -m benchmarks.faults.longrun --n 2000        # 2,000 steps; about 4 minutes of one core

Measured every 10 steps, from a tenth of the run on, when everything has been used once.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from benchmarks.faults.runs import Calls, Run
from benchmarks.faults.table import Options, Row, run

EVERY = 10
MEASURED = {"resident MB": 1.10, "open files": 1.0, "threads": 1.0, "CPU s a step": 1.5}
"""What is measured, and the growth that counts as none: allocators reach a plateau, a leak does not."""


def measure() -> tuple[float, ...]:
    """This process, now; of its CPU time all that it has used."""
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    return resident, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), sum(os.times()[:2])


def sampled(calls: Calls) -> None:
    """In the run: a line per ten updates."""
    from rlif_lightning.callbacks import RolloutCallback

    ended = RolloutCallback.on_train_batch_end

    def then(self: RolloutCallback, *args: object) -> None:
        ended(self, *args)
        if calls.count("update") % EVERY == 0:
            with open("measured.jsonl", "a") as file:
                file.write(json.dumps(measure()) + "\n")

    RolloutCallback.on_train_batch_end = then


def longrun(options: Options) -> Iterator[Row]:
    """The harness."""
    steps = max(options.n or 0, 10 * EVERY)
    words = [
        *options.fit, f"--trainer.max_steps={steps}", "--checkpoint.every=50", "--evaluation.every=200",
        "--rollout.prompts_per_step=4", "--model.optimizer.init_args.lr=1e-5", "--runs", "runs",
    ]  # fmt: skip
    what, done = f"{steps} steps", Run(words, "run.log", prepare=sampled).wait(3600)
    yield Row(what, done.ending, done.code == 0)
    rows = [json.loads(text) for text in Path("measured.jsonl").read_text().splitlines()]
    tenth = len(rows) // 10
    first, last, cpu = rows[tenth][:3], rows[-1][:3], [row[3] for row in rows]
    first.append((cpu[2 * tenth] - cpu[tenth]) / (tenth * EVERY))
    last.append((cpu[-1] - cpu[-1 - tenth]) / (tenth * EVERY))
    for (name, growth), before, after in zip(MEASURED.items(), first, last, strict=True):
        yield Row(what, f"{name}: {before:.3g} after a tenth, {after:.3g} at the end", after <= growth * before)
    for name in ("metrics.csv", "completions.jsonl"):
        size = sum(path.stat().st_size for path in Path("runs").rglob(name))
        yield Row(what, f"{name}: {size / steps:.0f} bytes a step", True)


if __name__ == "__main__":
    run(longrun, n=2000)
