"""Wall and CPU seconds of the quickstart: the first run with an empty cache, then later ones.

    python benchmarks/quickstart_time.py --repeats 3

Runs are processes of their own, as a user starts them, one after the other.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time


def quickstart(folder: str, cache: str, threads: int) -> tuple[float, float]:
    """Run the quickstart; returns wall and CPU seconds."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = {**os.environ, "RLIF_CACHE": cache, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "rlif_lightning", "fit", "--config", "quickstart"]
    subprocess.run(command, check=True, cwd=folder, env=environment, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - start, cpu


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="later runs, after the first")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = [quickstart(folder, f"{folder}/cache", options.threads) for _ in range(options.repeats + 1)]
    first, later = runs[0], runs[1:]
    import torch

    report = {
        "threads": options.threads,
        "first_wall_s": round(first[0], 1),
        "first_cpu_s": round(first[1], 1),
        "later_wall_s_median": round(statistics.median(w for w, _ in later), 1),
        "later_cpu_s_median": round(statistics.median(c for _, c in later), 1),
        "later_wall_s": [round(w, 1) for w, _ in later],
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
