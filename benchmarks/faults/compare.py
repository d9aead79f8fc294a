"""What two finished runs must have in common to be the same run, bit by bit."""

import csv
import pickle
import re
from pathlib import Path
from typing import Any

import torch

from benchmarks.faults.runs import Run

MEASURED = ("time/", "memory/", "rollout/tokens_per_second")  # different in any two runs
STATE = ("global_step", "state_dict", "optimizer_states", "lr_schedulers", "callbacks")


def outcome(whole: Path, run: Run, folder: Path) -> tuple[str, bool]:
    """What has become of a run that was continued, in words, and whether it is the uninterrupted one."""
    if run.code or run.hangs:
        return run.ending, False
    found = differences(whole, folder)
    return (f"another {', '.join(found)}", False) if found else ("the same", True)


def differences(one: Path, other: Path) -> list[str]:
    """Names of what differs between two run folders."""
    try:
        a, b = (checkpoint(run) for run in (one, other))
        found = [name for name in STATE if not equal(a[name], b[name])]
        found += [] if metrics(one) == metrics(other) else ["metrics.csv"]
        for name in ("completions.jsonl", "guard.json"):
            if (one / name).read_bytes() != (other / name).read_bytes():
                found.append(name)
        for kept in (one / "checkpoints").rglob("*.safetensors"):
            if not equal(tensors(kept), tensors(other / kept.relative_to(one))):
                found.append(f"guard/{kept.name}")
    except Exception as error:  # a file that is missing or damaged, in the words of its reader
        return [f"end: {type(error).__name__} {error}".replace(f"{other}/", "").replace(f"{Path.cwd()}/", "")[:120]]
    found += [f"{name} (missing)" for name in ("curves.png", "summary.txt") if not (other / name).is_file()]
    left = {p.name for p in other.rglob(".*")} - {p.name for p in one.rglob(".*")}
    return found + [f"{name} (left over)" for name in sorted(left)]


def checkpoint(run: Path) -> dict[str, Any]:
    """The last one."""
    return torch.load(run / "checkpoints" / "last.ckpt", "cpu", weights_only=True)


def step(run: Path) -> int | None:
    """The optimiser step of the last checkpoint; None where there is none that can be read."""
    try:
        return checkpoint(run)["global_step"]
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError):
        return None


def metrics(run: Path) -> list[dict[str, str]]:
    """metrics.csv without what is measured anew in every run."""
    with (run / "metrics.csv").open() as file:
        return [
            {k: v for k, v in row.items() if not k.startswith(MEASURED)}
            for row in csv.DictReader(file, restkey="more")
        ]


def tensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Tensors and facts of a safetensors file; facts have no order there."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def equal(a: Any, b: Any) -> bool:
    """The same bit by bit, whatever they hold; NaN equals NaN."""
    if isinstance(a, torch.Tensor):
        same = isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape
        return same and torch.equal(
            a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
        )
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, byte by byte; a link is what it names."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def changed(before: dict[str, bytes], folder: Path) -> list[str]:
    """The files that are no longer as they were, or that are new; event files without their machine's name."""
    now = contents(folder)
    found = (name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    return sorted({re.sub(r"(tfevents)\..*", r"\1", name) for name in found})


def finite(run: Path) -> bool:
    """Whether the weights of the last checkpoint are; true where there is none."""
    weights = checkpoint(run)["state_dict"].values() if step(run) is not None else []
    return all(bool(torch.isfinite(w).all()) for w in weights if w.is_floating_point())
