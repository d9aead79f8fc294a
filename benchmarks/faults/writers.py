"""Several commands on one run folder at the same time: is anything lost, and is the second writer told?

    python -m benchmarks.faults.writers     # about a minute of two cores

The first of two is held after a checkpoint until the other has ended.
"""

import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.faults import compare, runs
from benchmarks.faults.kills import Kill
from benchmarks.faults.runs import Run, Tell
from benchmarks.faults.table import Options, Row, run

LAST = ["--ckpt_path", "last"]


def held(nth: int, go: Path) -> Tell:
    """The run waits after its nth checkpoint until there is a file."""

    def tell(*call: object) -> None:
        while call == ("checkpoint", nth, True) and not go.exists():
            time.sleep(0.05)

    return tell


def stopped_half_way(options: Options, name: str) -> list[str]:
    """A run that was killed after its second checkpoint; returns its command."""
    words = [*options.fit, "--runs", name]
    Run(words, f"{name}.log", Kill("checkpoint", 2, "after")).wait()
    return words


def continued_while_it_runs(whole: Path, options: Options) -> Row:
    """As a job that is queued again too early, or a second terminal."""
    words, go = [*options.fit, "--runs", "early"], Path("early.go")
    first = Run(words, "early.log", held(2, go)).until("checkpoint", 2)
    second = Run([*words, *LAST], "early.second.log").wait()
    go.touch()
    seen, same = compare.outcome(whole, first.wait(), runs.newest("early"))
    right = same and second.refused
    return Row("a run is continued while it still runs", f"the second: {second.ending}; the first: {seen}", right)


def continued_twice(whole: Path, options: Options) -> Row:
    """Either may be the one that continues; the other may also come so late that nothing is left to do."""
    words = stopped_half_way(options, "twice")
    both = [Run([*words, *LAST], f"twice.{i}.log") for i in range(2)]
    ended = [one.wait() for one in both]
    found = compare.differences(whole, runs.newest("twice"))
    right = not found and all(one.code == 0 or one.refused for one in ended)
    seen = f"another {', '.join(found)}" if found else "the same"
    return Row("a run is continued twice at once", f"{ended[0].ending}; {ended[1].ending}; {seen}", right)


def two_new_runs(whole: Path, options: Options) -> Row:
    """They take numbers of their own."""
    both = [Run([*options.fit, "--runs", "pair"], f"pair.{i}.log") for i in range(2)]
    ended = [one.wait() for one in both]
    seen = [compare.outcome(whole, one, Path(f"pair/quickstart/{i}")) for i, one in enumerate(ended, start=1)]
    return Row("two runs begin at once", "; ".join(text for text, _ in seen), all(same for _, same in seen))


def read_while_it_runs(whole: Path, options: Options) -> Row:
    """Commands that read a run folder see a whole state of it, and leave the run alone."""
    words, go = [*options.fit, "--runs", "read"], Path("read.go")
    first = Run(words, "read.log", held(2, go)).until("checkpoint", 2)
    folder = runs.newest("read")
    readers = {
        "report": ["report", folder],
        "export": ["export", folder, "--output", "exported"],
        "validate": [
            "validate",
            *words[1:3],
            *words[-2:],
            *options.model,
            "--ckpt_path",
            folder,
            "--data.val.limit=4",
        ],
    }
    ended = {name: Run(command, f"{name}.log").wait() for name, command in readers.items()}
    go.touch()
    seen, same = compare.outcome(whole, first.wait(), folder)
    wrong = [f"{name}: {one.ending}" for name, one in ended.items() if one.code]
    seen = "; ".join([*(wrong or ["all exit 0"]), f"the run: {seen}"])
    return Row("report, export and validate of a run that still runs", seen, same and not wrong)


def writers(options: Options) -> Iterator[Row]:
    """The harness."""
    assert Run([*options.fit, "--runs", "whole"], "whole.log").wait().code == 0, "see whole.log"
    whole = runs.newest("whole")
    for case in options.drawn([continued_while_it_runs, continued_twice, two_new_runs, read_while_it_runs]):
        yield case(whole, options)


if __name__ == "__main__":
    run(writers)
