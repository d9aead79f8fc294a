"""A long run: do memory, open files, threads and the time of a step stay where they were?

    python -m benchmarks.faults.longrun --n 2000        # 2,000 steps; about 4 minutes of one core

Measured every 10 steps. Memory, open files and threads count after step 800 of 2,000, when allocators have reached
their plateau: the largest value from there on, next to the one there. The time of a step is that of the run's second
tenth and of its last.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from benchmarks.faults.runs import Calls, Run
from benchmarks.faults.table import Options, Row, run

EVERY = 10
WARM = 0.4  # of the run: step 800 of 2,000
MEASURED = {"resident MB": 1.02, "open files": 1.0, "threads": 1.0}
"""What is measured, and the growth that counts as none: allocators reach a plateau, a leak does not."""
SLOWER = 1.5  # the growth of a step's time that counts as none


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
    what, done = f"{steps} steps", Run(words, "run.log", prepare=sampled).wait(7200)
    yield Row(what, done.ending, done.code == 0)
    rows = [json.loads(text) for text in Path("measured.jsonl").read_text().splitlines()]
    warm, tenth = max(round(WARM * len(rows)), 1) - 1, len(rows) // 10
    for i, (name, growth) in enumerate(MEASURED.items()):
        before, most, last = rows[warm][i], max(row[i] for row in rows[warm:]), rows[-1][i]
        seen = f"{before:.4g} at step {(warm + 1) * EVERY}, at most {most:.4g} from there on, {last:.4g} at the end"
        yield Row(what, f"{name}: {seen}", most <= growth * before)
    early, late = ((rows[to][3] - rows[to - tenth][3]) / (tenth * EVERY) for to in (2 * tenth, -1 + len(rows)))
    seen = f"CPU s a step: {early:.3g} in the second tenth, {late:.3g} in the last"
    yield Row(what, seen, late <= SLOWER * early)
    for name in ("metrics.csv", "completions.jsonl"):
        size = sum(path.stat().st_size for path in Path("runs").rglob(name))
        yield Row(what, f"{name}: {size / steps:.0f} bytes a step", True)


if __name__ == "__main__":
    run(longrun, n=2000)
