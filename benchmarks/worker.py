"""One side in a process of its own: ``python -m benchmarks.worker benchmarks.trl_side WORK``."""

import importlib
import os
import sys
import warnings

from benchmarks.gate import Gate
from benchmarks.shapes import Work


def main(side: str, work: str) -> None:
    """Run ``side.run(work, gate)``; what libraries print goes to the log."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.filterwarnings("ignore")
    import torch

    torch.set_num_threads(1)
    importlib.import_module(side).run(Work.from_json(work), Gate(sys.stdin, answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
