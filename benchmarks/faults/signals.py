"""Signals that ask a command to end: does the exit code say so, is anything lost, is the continued run the same?

    python -m benchmarks.faults.signals     # about 6 minutes of one core

TERM, INT, HUP and USR1, while the weights are loaded, in the first evaluation, a rollout, an update and the report of
a fit, and in the commands that train nothing (`plan` and `report` are done too soon). USR1 under SLURM also, with a
`scontrol` of our own: SLURM's warning must not make Lightning queue the job again, nor leave a checkpoint that later
jobs start from.
"""

import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.faults import compare, runs
from benchmarks.faults.runs import Run
from benchmarks.faults.table import Options, Row, run

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
PLACES = {"loading": 1, "evaluation": 1, "rollout": 4, "update": 3, "report": 1}  # which call of the part
RESULTS = (
    "results.json",
    "problems.jsonl",
    "predictions.jsonl",
    "diagnosis.json",
    "model.safetensors",
)  # mix writes as it goes
AGAIN = 75  # the exit code that asks to be started again
PATIENCE = 60.0
SLURM = {
    "SLURM_JOB_ID": "77", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost",
}  # fmt: skip


def says_unfinished(stopped: Run, number: signal.Signals) -> bool:
    """Whether a scheduler knows by the exit code that there is more to do; a shell adds 128 to a signal's number."""
    return not stopped.hangs and stopped.code in (AGAIN, 128 + number, 128 + signal.SIGTERM, -number)


def signalled(run: Run, number: signal.Signals) -> tuple[Run, str]:
    """Send a signal to a run and wait; the run, and how it ended after how long."""
    start = time.monotonic()
    run.send(number).wait(PATIENCE)
    return run, f"{run.ending} after {time.monotonic() - start:.1f} s"


def in_fit(whole: Path, options: Options, number: signal.Signals, part: str) -> Row:
    """Signal, then continue."""
    name = f"{number.name}-{part}"
    begun = Run([*options.fit, "--runs", name], f"{name}.log").until(part, PLACES[part])
    stopped, ended = signalled(begun, number)
    done = stopped.calls.count("update") - (part == "update")  # a slice is a step here
    saved = compare.step(runs.newest(name)) or 0
    finished = stopped.code == 0 and not compare.differences(whole, runs.newest(name))
    kept_steps = saved >= done or part in ("loading", "evaluation")
    seen, same = compare.outcome(whole, runs.again(stopped, f"{name}.again.log"), runs.newest(name))
    lost = "" if kept_steps else f", {done - saved} steps lost"
    right = same and kept_steps and (finished or says_unfinished(stopped, number))
    return Row(f"{number.name}, fit, {part}", f"{ended}{lost}; then {seen}", right and not stopped.traceback)


def in_command(words: list[str], part: str, number: signal.Signals) -> Row:
    """Signal while completions are sampled, or files are written; what is left must not look like a result."""
    name = f"{number.name}-{words[0]}"
    stopped, ended = signalled(Run([*words, name], f"{name}.log").until(part), number)
    files = sorted({p.name for p in Path(name).rglob("*") if p.name in RESULTS})
    right = says_unfinished(stopped, number) and not stopped.traceback and not files
    return Row(f"{number.name}, {words[0]}", f"{ended}{'; left ' + ', '.join(files) if files else ''}", right)


def under_slurm(whole: Path, options: Options) -> Row:
    """SLURM's warning, the job once more, and another job of the same folder."""
    fit, folder, home = options.fit, Path("slurm"), Path.cwd()
    (folder / "bin").mkdir(parents=True)
    scontrol = folder / "bin" / "scontrol"
    scontrol.write_text('#!/bin/sh\necho "$@" >> "$(dirname "$0")/asked"\n')
    scontrol.chmod(0o755)
    environment = {**SLURM, "PATH": f"{scontrol.parent.absolute()}:{os.environ['PATH']}"}
    os.chdir(folder)  # where Lightning would leave its own checkpoint
    try:
        begun = Run([*fit, "--runs", "job"], "job.log", **environment).until("rollout", 4)
        stopped, ended = signalled(begun, signal.SIGUSR1)
        then = runs.again(stopped, "again.log", **environment)
        seen, same = compare.outcome(home / whole, then, runs.newest("job"))
        other = Run([*fit, "--runs", "other"], "other.log", **environment).wait()
        other_seen, other_same = compare.outcome(home / whole, other, runs.newest("other"))
        wrong = [p.name for p in (*Path().glob("hpc_ckpt*"), *Path("bin").glob("asked"))]
    finally:
        os.chdir(home)
    left = f"; left {', '.join(wrong)}" if wrong else ""
    right = same and other_same and not wrong and says_unfinished(stopped, signal.SIGUSR1)
    return Row("SIGUSR1 under SLURM", f"{ended}{left}; then {seen}; another job {other_seen}", right)


def signals(options: Options) -> Iterator[Row]:
    """The harness."""
    assert Run([*options.fit, "--runs", "whole"], "whole.log").wait().code == 0, "see whole.log"
    whole, plain = runs.newest("whole"), ["--config", "quickstart", *options.model]
    some = ["--evaluation.batch_size=20", "--evaluation.samples=8"]
    commands = [
        ["test", *plain, *some, "--runs"],
        ["validate", *plain, *some, "--runs"],
        ["predict", *plain, *some, "--runs"],
        ["diagnose", *plain, "--runs"],
        ["mix", *plain, "--tuned", f"{whole.absolute()}/checkpoints/last.ckpt", "--runs"],
        ["export", f"{whole}", "--output"],
    ]
    cases = [partial(in_fit, whole, options, number, part) for number in NUMBERS for part in PLACES]
    cases += [partial(under_slurm, whole, options)]
    for words in commands:
        part = "files" if words[0] == "export" else "sampling"
        cases += [partial(in_command, words, part, number) for number in NUMBERS]
    for case in options.drawn(cases):
        yield case()


if __name__ == "__main__":
    run(signals)
