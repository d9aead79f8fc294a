"""A power cut: what reaches the disk, and in which order? Read from the system calls of a run (strace).

    python -m benchmarks.faults.power       # about a minute of one core

What a cut leaves is what was brought to the disk before it. So a file that takes another's place must be synced
before its rename and its folder after it, and a checkpoint may only take its place when the rows before it are there.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks.faults.table import Options, Row, run

CALLS = "write,pwrite64,fsync,fdatasync,rename,renameat,renameat2"
ROWS = ("metrics.csv", "completions.jsonl")
LINE = re.compile(r"^(?:\d+ +)?(?P<call>\w+)\((?P<rest>.*?)(?:\) += +(?P<result>-?\d+).*| <unfinished \.\.\.>)$")
HANDLE = re.compile(r"^\d+<(?P<path>[^>]+)>(?!\(deleted\))")
RENAMED = re.compile(r'(?:AT_FDCWD(?:<[^>]*>)?, )?"(?P<old>[^"]+)", (?:AT_FDCWD(?:<[^>]*>)?, )?"(?P<new>[^"]+)"')


def broken(lines: Iterable[str], folder: Path) -> dict[str, int]:
    """What of the order is not as it must be, with how often, in a log of `strace -f -y` from next to the folder."""
    dirty: set[Path] = set()  # written and not synced
    moved: dict[Path, Path] = {}  # folders with a rename that is not synced, and its new name
    wrong: dict[str, int] = {}

    def note(what: str) -> None:
        wrong[what] = wrong.get(what, 0) + 1

    for text in lines:
        found = LINE.match(text.rstrip())
        if found is None or (found["result"] or "").startswith("-"):
            continue
        call, rest = found["call"], found["rest"]
        if call.startswith("rename"):
            names = RENAMED.search(rest)
            old, new = (folder.parent / names[which] for which in ("old", "new")) if names else (folder, folder)
            if names is None or folder not in new.parents:
                continue
            dirty = dirty - {old, new} | ({new} if old in dirty else set())
            if new.name.startswith("."):  # not yet where anyone looks for it
                continue
            if new in dirty:
                note(f"{new.name} takes its place before it is on the disk")
            if new.parent in moved:
                note(f"the new name of {moved[new.parent].name} is not brought to the disk")
            if new.name == "last.ckpt":
                for late in sorted(path.name for path in dirty if path.name in ROWS):
                    note(f"last.ckpt takes its place before {late} is on the disk")
            moved[new.parent] = new
            continue
        handle = HANDLE.match(rest)
        path = Path(handle["path"]) if handle else Path()
        if folder not in path.parents:
            continue
        if "write" in call:
            dirty.add(path)
        else:
            dirty.discard(path)
            moved.pop(path, None)
    for path in moved.values():
        note(f"the new name of {path.name} is not brought to the disk")
    return wrong


def power(options: Options) -> Iterator[Row]:
    """The harness."""
    if shutil.which("strace") is None:
        yield Row("a power cut", "it takes strace", None)
        return
    rlif, log = Path(sys.executable).with_name("rlif"), Path("calls.log")
    strace = ["strace", "-f", "-y", "-s", "0", "-e", f"trace={CALLS}", "-o", str(log)]
    with open("run.log", "wb") as said:
        done = subprocess.run([*strace, rlif, *options.fit, "--runs", "runs"], stdout=said, stderr=said, check=False)
    if done.returncode:
        yield Row("a power cut", "strace can't watch a run here: look into run.log", None)
        return
    with log.open(errors="replace") as lines:
        wrong = broken(lines, Path("runs").absolute())
    for what, times in wrong.items():
        yield Row("a power cut", f"{what}, {times} times", False)
    if not wrong:
        yield Row("a power cut", "everything is on the disk in its order", True)


if __name__ == "__main__":
    run(power)
