"""Traps of continuing: a refused one changes no byte of the folder, and `last` never continues what was not meant.

    python -m benchmarks.faults.resume      # about a minute of one core

What is continued is a copy of a run that was killed half-way.
"""

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.faults import compare, runs
from benchmarks.faults.kills import Kill
from benchmarks.faults.runs import Run
from benchmarks.faults.table import Options, Row, run

LAST = ["--ckpt_path", "last"]
LORA = "--model.lora={r: 4, lora_alpha: 8, target_modules: [q_proj]}"
OTHERS = {
    "with an adapter": [LORA],
    "with another optimiser": ["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.1"],
    "with other prompts": ["--data.train.limit=40"],
    "with more prompts per rollout": ["--rollout.prompts_per_step=16"],
    "with another model": ["--model.name=other-model"],
    "with a setting out of range": ["--model.kl_coefficient=-1.0"],
}


def refused(name: str, settings: list[str], options: Options) -> Row:
    """Continue half a run with settings that do not fit it."""
    shutil.rmtree("refused", ignore_errors=True)
    shutil.copytree("half", "refused")
    before = compare.contents(Path("refused"))
    asked = Run([*options.fit, *settings, *LAST, "--runs", "refused"], f"{name.replace(' ', '-')}.log").wait()
    changes = compare.changed(before, Path("refused"))
    seen = f"{asked.ending}{'; changed ' + ', '.join(changes) if changes else ''}"
    return Row(f"continued {name}", seen, asked.refused and not changes)


def after_a_refusal(whole: Path, options: Options) -> Row:
    """The run continues with its own settings as if nothing had been."""
    shutil.copytree("half", "after")
    words = [*options.fit, *LAST, "--runs", "after"]
    Run([*words, LORA], "after.refused.log").wait()
    return Row(
        "continued rightly after a refusal",
        *compare.outcome(whole, Run(words, "after.log").wait(), runs.newest("after")),
    )


def said(options: Options) -> Row:
    """What changed since the checkpoint and is allowed to."""
    shutil.copytree("half", "said")
    other = Run([*options.fit, "--model.kl_coefficient=0.5", *LAST, "--runs", "said"], "said.log").wait()
    tells = "kl_coefficient" in other.said
    return Row(
        "continued with another kl_coefficient", f"{other.ending}; {'says so' if tells else 'not a word'}", tells
    )


def finished(whole: Path, options: Options) -> Row:
    """A scheduler that repeats a finished job."""
    shutil.copytree("whole", "finished")
    repeated = Run([*options.fit, *LAST, "--runs", "finished"], "finished.log").wait()
    return Row("a finished run is continued", *compare.outcome(whole, repeated, Path("finished/quickstart/1")))


def newer_run(whole: Path, asked: str, options: Options) -> Row:
    """Run 1 was stopped half-way; run 2, with another setting, died before its first checkpoint."""
    name, other = f"newer-{asked}", "--model.kl_coefficient=0.5"
    shutil.copytree("half", name)
    words = [*options.fit, "--runs", name]
    Run([*words, other], f"{name}.died.log", Kill("evaluation", 1, "before")).wait()
    before = compare.contents(Path(name, "quickstart/1"))
    again = Run([*words, other, "--ckpt_path", asked], f"{name}.log").wait()
    touched = compare.changed(before, Path(name, "quickstart/1"))
    steps = compare.step(runs.newest(name))
    began = again.code == 0 and steps == compare.step(whole)
    seen = (
        f"{again.ending}{'; run 1 was continued' if touched else ''}{'; the newer run is complete' if began else ''}"
    )
    right = not touched and (began or (asked == "last" and again.refused))
    return Row(f"`{asked}` after a newer run without a checkpoint", seen, right)


def nothing_there(whole: Path, options: Options) -> Row:
    """What a job script says at its first start and at every other."""
    begun = Run([*options.fit, "--runs", "auto", "--ckpt_path", "auto"], "auto.log").wait()
    return Row("`auto` where there is no run", *compare.outcome(whole, begun, runs.newest("auto")))


def resume(options: Options) -> Iterator[Row]:
    """The harness."""
    assert Run([*options.fit, "--runs", "whole"], "whole.log").wait().code == 0, "see whole.log"
    whole = runs.newest("whole")
    Run([*options.fit, "--runs", "half"], "half.log", Kill("checkpoint", 2, "after")).wait()
    runs.untrained("other-model", seed=9)
    cases = [partial(refused, name, settings) for name, settings in OTHERS.items()]
    cases += [partial(case, whole) for case in (after_a_refusal, finished, nothing_there)] + [partial(said)]
    cases += [partial(newer_run, whole, asked) for asked in ("last", "auto")]
    for case in options.drawn(cases):
        yield case(options)


if __name__ == "__main__":
    run(resume)
