"""The GPU day: correctness, speed and memory on a CUDA device, with random weights and no network.

    python -m benchmarks.gpu                     # what is not done yet; about 25 minutes in all
    python -m benchmarks.gpu --part decode       # a part, each at most 8 minutes
    python -m benchmarks.gpu --device cpu --tiny # only to see that everything runs

Results are kept check by check in OUT/gpu.json, and what is done is not repeated. OUT/gpu.md and docs/gpu.md are
written from it; where there is no GPU nothing else is done.
"""

import os

# This process only forks, and a GPU can't be used in forks of a process that has asked CUDA itself about it.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
os.environ.update({"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "NVIDIA_TF32_OVERRIDE": "0"})

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers.models.qwen2.modeling_qwen2  # noqa: F401  for all forks

from benchmarks import result
from benchmarks.bar import SkipError
from benchmarks.gpu import rows
from benchmarks.gpu.apart import apart
from benchmarks.gpu.day import Day
from benchmarks.gpu.parts import Check, parts
from rlif_lightning.runs.atomic import write_text

ROOT = Path(__file__).parents[2]
LIMIT = 300.0  # seconds of a check


def describe_device(device: str) -> str:
    """Name, memory, compute capability, CUDA and driver, to be asked in a fork."""
    if device == "cpu":
        return "a CPU"
    if not torch.cuda.is_available():
        raise SkipError("there is no GPU that torch can use")
    found = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    driver = f"driver {_said(query) or 'unknown'}, CUDA {torch.version.cuda}"
    return f"{found.name}, {found.total_memory / 2**30:.0f} GiB, capability {found.major}.{found.minor}, {driver}"


def _said(command: list[str]) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def setting(device: str) -> dict[str, Any]:
    """When, on what, and of which tree; kept with every check."""
    commit = _said(["git", "rev-parse", "--short", "HEAD"]) or "unknown"
    commit += " with changes" if _said(["git", "diff", "--stat", "HEAD", "--", ":!docs/gpu.md"]) else ""
    return {**result.setting("python -m benchmarks.gpu", 3, 1), "device": device, "commit": commit}


def run(check: Check, day: Day, name: str) -> list[rows.Row]:
    """A check's rows; whatever happens to it is one."""
    try:
        found: list[rows.Row] = apart(partial(check, day), day.logs / f"{name.replace('/', ', ')}.log", LIMIT)
    except SkipError as reason:
        return [rows.Row(name, str(reason), verdict="not run")]
    except RuntimeError as error:
        return [rows.Row(name, str(error), verdict="failed")]
    return found


def write(file: Path, done: dict[str, Any], checks: dict[str, Any], docs: Path | None) -> None:
    """JSON, and the page made of it."""
    write_text(file, json.dumps(done, indent=1) + "\n")
    write_text(file.with_suffix(".md"), text := rows.page(done, checks))
    if docs is not None and done:
        result.fill(docs, text, rows.BEGIN, rows.END)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is not done yet, print it row by row, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=list(parts(False)), help="default: all")
    parser.add_argument("--again", action="store_true", help="repeat what is done")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model everywhere, for OUT/tiny.json only")
    options = parser.parse_args(arguments)
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu measures nothing: give --tiny as well")
    out, checks = options.out.resolve(), parts(options.tiny)
    (out / "logs").mkdir(parents=True, exist_ok=True)
    file, docs = (out / "tiny.json", None) if options.tiny else (out / "gpu.json", ROOT / "docs" / "gpu.md")
    done: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    write(file, done, checks, docs)
    try:
        how = setting(apart(partial(describe_device, options.device), out / "logs" / "device.log", LIMIT))
    except (SkipError, RuntimeError) as reason:
        sys.exit(f"{reason}: only the page was written, from {file}")
    with tempfile.TemporaryDirectory() as folder:
        day = Day(options.device, Path(folder), out / "logs", options.tiny)
        for part in options.part or checks:
            for name, check in checks.get(part, {}).items():
                key = f"{part}/{name}"
                if key in done and not options.again:
                    continue
                start = time.perf_counter()
                found = run(check, day, key)
                seconds = time.perf_counter() - start
                done[key] = {"rows": [vars(row) for row in found], "seconds": seconds, "setting": how}
                write(file, done, checks, docs)
                print(*(f"{row.verdict:<9}{row.name}: {row.value}" for row in found), sep="\n", flush=True)
    print(", ".join(f"{n} {verdict}" for verdict, n in rows.count(done).items()), f"in {file.with_suffix('.md')}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a check ends with it
    main()
