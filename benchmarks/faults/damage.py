"""Damaged files of a run, and of the toy's cache: is it noticed, and does the run continue from what is whole?

    python -m benchmarks.faults.damage      # about 2 minutes of one core

An older checkpoint stands next to the damaged one. Right is the uninterrupted run, or a refusal that changes nothing.
"""

import random
import shutil
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from benchmarks.faults import compare, runs
from benchmarks.faults.kills import Kill
from benchmarks.faults.runs import Run
from benchmarks.faults.table import Options, Row, run

LAST = "checkpoints/last.ckpt"


def flipped(data: bytes, at: int) -> bytes:
    """One bit is another."""
    return data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :]


def place(data: bytes, path: Path, name: str | None) -> int:
    """Where a member's bytes begin in a zip file; null: the largest's."""
    with zipfile.ZipFile(path) as file:
        members = [m for m in file.infolist() if name is None or m.filename.endswith(name)]
    header = max(members, key=lambda m: m.file_size).header_offset
    names = (int.from_bytes(data[header + at : header + at + 2], "little") for at in (26, 28))
    return header + 30 + sum(names)


def checkpoints(path: Path, rng: random.Random) -> dict[str, bytes]:
    """What may stand in place of a checkpoint."""
    fine = path.read_bytes()
    weight, pickled = place(fine, path, None), place(fine, path, "data.pkl")
    return {
        "empty": b"",
        "cut in half": fine[: len(fine) // 2],
        "without its last 20 bytes": fine[:-20],
        "noise": rng.randbytes(5000),
        "a text": b"hello\n" * 50,
        "zeros": bytes(len(fine)),
        "one bit of a weight flipped": flipped(fine, weight + 3),
        "one bit of the pickle flipped": flipped(fine, pickled + 200),
        "one bit of the directory flipped": flipped(fine, len(fine) - 200),
        "a page of zeros": fine[: weight + 512] + bytes(4096) + fine[weight + 512 + 4096 :],
        "another run's, with an adapter": Path("other/quickstart/1", LAST).read_bytes(),
    }


def torn(data: bytes) -> bytes:
    """A line in the middle is cut short."""
    lines = data.split(b"\n")
    return b"\n".join([*lines[:2], lines[2][: len(lines[2]) // 2], *lines[3:]])


COMPANIONS: list[tuple[str, str, Callable[[bytes], bytes]]] = [
    ("the guard's weights, empty", "checkpoints/guard/weights.safetensors", lambda _: b""),
    ("the guard's weights, cut in half", "checkpoints/guard/weights.safetensors", lambda x: x[: len(x) // 2]),
    ("metrics.csv, torn in the middle", "metrics.csv", torn),
    ("metrics.csv, empty", "metrics.csv", lambda _: b""),
    ("metrics.csv, zeros at its end", "metrics.csv", lambda x: x + bytes(700)),
    ("completions.jsonl, zeros at its end", "completions.jsonl", lambda x: x + bytes(700)),
    ("guard.json, cut in half", "guard.json", lambda x: x[: len(x) // 2]),
    ("config.yaml, empty", "config.yaml", lambda _: b""),
]


def continued(whole: Path, what: str, name: str, content: bytes | None, options: Options) -> Row:
    """Damage a file (None: put a folder in its place) and continue."""
    shutil.rmtree("hurt", ignore_errors=True)
    shutil.copytree("half", "hurt")
    target = Path("hurt/quickstart/1", name)
    target.unlink()  # numbered checkpoints may be links to it
    target.mkdir() if content is None else target.write_bytes(content)
    before = compare.contents(Path("hurt"))
    log = f"{what.replace(' ', '-')}.log"
    asked = Run([*options.fit, "--checkpoint.keep=3", "--ckpt_path", "last", "--runs", "hurt"], log).wait()
    changes = compare.changed(before, Path("hurt"))
    if asked.code:
        seen = f"{asked.ending}{'; changed ' + ', '.join(changes) if changes else ''}"
        return Row(what, seen, asked.refused and not changes)
    seen, same = compare.outcome(whole, asked, runs.newest("hurt"))
    tells = Path(name).name in asked.said
    without_guard = name.startswith("checkpoints/guard") and seen.startswith("another guard")
    without_rows = seen == "another metrics.csv" and "the rows of earlier steps are lost" in asked.said
    left_out = tells and (without_guard or without_rows)  # what nothing can bring back, if that is said
    seen += ", left out with a warning" if left_out else "" if tells else ", without a word"
    return Row(what, seen, same or left_out)


def cache(what: str, options: Options) -> Row:
    """A built toy after a power cut: built anew, or a paragraph."""
    from rlif_lightning.toy import toy_model

    good = toy_model(progress=False)
    folder = Path("cache").absolute() / good.name
    shutil.rmtree("cache", ignore_errors=True)
    shutil.copytree(good, folder)
    weights = (folder / "model.safetensors").read_bytes()
    if what == "without a tokenizer":
        (folder / "tokenizer.json").unlink()
    else:
        (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2 if "half" in what else 0])
    words, log = [*options.fit, "--runs", "cached"], f"cache-{what.replace(' ', '-')}.log"
    used = Run(words, log, RLIF_CACHE=str(folder.parent)).wait()
    return Row(f"the toy's cache, {what}", used.ending, used.code == 0 or used.refused)


def damage(options: Options) -> Iterator[Row]:
    """The harness."""
    rng = random.Random(options.seed)
    assert Run([*options.fit, "--runs", "whole"], "whole.log").wait().code == 0, "see whole.log"
    whole, keep = runs.newest("whole"), "--checkpoint.keep=3"
    Run([*options.fit, keep, "--runs", "half"], "half.log", Kill("checkpoint", 3, "after")).wait()
    lora = "--model.lora={r: 4, lora_alpha: 8, target_modules: [q_proj]}"
    Run([*options.fit, lora, "--runs", "other"], "other.log", Kill("checkpoint", 2, "after")).wait()
    half = runs.newest("half")
    assert any((half / "checkpoints").glob("step=*.ckpt")), "see half.log"
    cases = [
        partial(continued, whole, f"last.ckpt, {what}", LAST, content)
        for what, content in {**checkpoints(half / LAST, rng), "a folder": None}.items()
    ]
    cases += [
        partial(continued, whole, what, name, hurt((half / name).read_bytes()))
        for what, name, hurt in COMPANIONS
        if (half / name).exists()
    ]
    if not options.tiny:
        cases += [partial(cache, what) for what in ("empty weights", "half the weights", "without a tokenizer")]
    for case in options.drawn(cases):
        yield case(options)


if __name__ == "__main__":
    run(damage)
