"""A disk that is full, or turns read-only, in mid-run: what is lost, what is said, does the run continue?

    python -m benchmarks.faults.disk        # about 3 minutes of one core

The disk is a small tmpfs in a mount namespace of the harness's own (`unshare`), which ends with it. Read-only needs
root: ext4 on a loop device whose journal is aborted.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.faults import compare, runs
from benchmarks.faults.runs import Run, Tell
from benchmarks.faults.table import Options, Row, run

DISK = Path("disk")
INSIDE = "FAULTS_OWN_MOUNTS"  # an environment variable: this process is in its own namespace
UNSHARE = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
FULL = [  # part, which call of it, kB that are left
    ("loading", 1, 0), ("metrics", 1, 0), ("metrics", 14, 0), ("completions", 5, 0), ("rollout", 6, 8),
    ("checkpoint", 1, 0), ("checkpoint", 2, 0), ("checkpoint", 2, 600), ("checkpoint", 3, 1000), ("guard", 2, 0),
    ("guard", 3, 200), ("evaluation", 3, 0), ("report", 1, 60), ("report", 1, 0),
]  # fmt: skip


def mount(*words: str) -> None:
    """Put an empty small disk in place of the one before."""
    subprocess.run(["umount", "--lazy", DISK], stderr=subprocess.DEVNULL)
    DISK.mkdir(exist_ok=True)
    subprocess.run(["mount", *words, DISK], check=True)


def tmpfs(size: str = "12m") -> None:
    """In memory."""
    mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs")


def fill(left: int = 0) -> None:
    """Take all room but so many kB."""
    free = os.statvfs(DISK)
    assert os.path.ismount(DISK) and free.f_blocks * free.f_frsize < 64 << 20, "never fill a real disk"
    room = max(0, free.f_bavail * free.f_frsize - left * 1024)
    with (DISK / "ballast").open("ab", buffering=0) as file:
        try:
            while room > 0:
                room -= file.write(bytes(min(room, 1 << 16)))
        except OSError:  # a part of a page is left
            pass


def fill_at(part: str, nth: int, left: int = 0, ended: bool = False) -> Tell:
    """Fill the disk at a call."""
    return lambda *call: fill(left) if call == (part, nth, ended) else None


def full(whole: Path, options: Options, part: str, nth: int, left: int) -> Row:
    """Full in mid-run; then there is room again."""
    tmpfs()
    name = f"full-{part}-{nth}-{left}"
    stopped = Run([*options.fit, "--runs", DISK / "runs"], f"{name}.log", fill_at(part, nth, left)).wait()
    (DISK / "ballast").unlink(missing_ok=True)
    seen, same = compare.outcome(whole, runs.again(stopped, f"{name}.again.log"), runs.newest(DISK / "runs"))
    right = same and not stopped.traceback and not stopped.hangs
    return Row(f"disk full at {part} {nth}, {left} kB left", f"{stopped.ending}; with room again {seen}", right)


def full_export(left: int, options: Options) -> Row:
    """Over an earlier export, which must stay."""
    tmpfs()
    shutil.copytree("whole", DISK / "runs")
    words = ["export", DISK / "runs/quickstart/1", "--output", DISK / "export"]
    Run(words, "export.log").wait()
    before = compare.contents(DISK / "export")
    fill(left)
    second = Run(words, f"export-{left}.log").wait()
    hurt = compare.changed(before, DISK / "export")
    seen = f"{second.ending}; the earlier export is {'hurt' if hurt else 'whole'}"
    return Row(f"disk full, export, {left} kB left", seen, second.refused and bool(before) and not hurt)


def full_validate(options: Options) -> Row:
    """When all is answered and graded: the numbers are at least printed."""
    tmpfs()
    words = [
        "validate",
        "--config",
        "quickstart",
        *options.model,
        "--ckpt_path",
        "whole/quickstart/1",
        "--data.val.limit=20",
    ]
    done = Run([*words, "--runs", DISK / "runs"], "validate.log", fill_at("evaluation", 1, ended=True)).wait()
    printed = "accuracy" in done.said
    seen = f"{done.ending}; results {'printed' if printed else 'lost'}"
    return Row("disk full, validate, all answered", seen, printed and not done.traceback)


def full_cache(options: Options) -> Row:
    """No room to keep the toy."""
    tmpfs("300k")
    cache = str(DISK.absolute() / "cache")

    def untrained(_: object) -> None:
        from rlif_lightning.toy import cache as toy

        toy.PHASES["toy"] = ()  # training takes half a minute, and is not what fails

    words = ["fit", *runs.SMALL, "--runs", "no-cache"]
    ended = Run(words, "cache.log", prepare=untrained, RLIF_CACHE=cache).wait()
    return Row("disk full, the toy's cache", ended.ending, ended.refused)


def read_only(whole: Path, options: Options, part: str, nth: int) -> Row:
    """As the kernel does after an error of the disk; then it is checked and mounted anew."""
    if os.geteuid() != 0 or shutil.which("mkfs.ext4") is None:
        return Row(f"disk read-only at {part} {nth}", "it takes root, a loop device and mkfs.ext4", None)
    subprocess.run(["umount", "--lazy", DISK], stderr=subprocess.DEVNULL)
    Path("image").write_bytes(bytes(24 << 20))
    subprocess.run(["mkfs.ext4", "-q", "-F", "image"], check=True)
    mount("-o", "loop", "image")

    def abort(*call: object) -> None:
        if call == (part, nth, False):
            subprocess.run(["mount", "-o", "remount,abort", DISK], check=False)

    name = f"read-only-{part}"
    stopped = Run([*options.fit, "--runs", DISK / "runs"], f"{name}.log", abort).wait()
    subprocess.run(["umount", DISK], check=True)
    subprocess.run(["e2fsck", "-fy", "image"], check=False, capture_output=True)
    mount("-o", "loop", "image")
    seen, same = compare.outcome(whole, runs.again(stopped, f"{name}.again.log"), runs.newest(DISK / "runs"))
    right = same and not stopped.traceback and stopped.code != 0
    return Row(f"disk read-only at {part} {nth}", f"{stopped.ending}; checked and mounted again: {seen}", right)


def disk(options: Options) -> Iterator[Row]:
    """The harness."""
    if INSIDE not in os.environ:
        yield Row("a full disk", "it takes a mount namespace (unshare), which this machine does not allow", None)
        return
    assert Run([*options.fit, "--runs", "whole"], "whole.log").wait().code == 0, "see whole.log"
    whole = runs.newest("whole")
    cases = [partial(full, whole, options, *case) for case in FULL]
    cases += [partial(full_export, left, options) for left in (0, 100, 420)]
    cases += [partial(full_validate, options), partial(full_cache, options)]
    cases += [partial(read_only, whole, options, *case) for case in (("rollout", 6), ("checkpoint", 2))]
    for case in options.drawn(cases):
        yield case()
    subprocess.run(["umount", "--lazy", DISK], stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    if INSIDE not in os.environ and shutil.which("unshare") and not subprocess.run([*UNSHARE, "true"]).returncode:
        command = [*UNSHARE, sys.executable, "-m", "benchmarks.faults.disk", *sys.argv[1:]]
        os.execvpe("unshare", command, {**os.environ, INSIDE: "1"})
    run(disk)
