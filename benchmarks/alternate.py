"""Two sides in turn: A B A B, each in a process of its own, one working at a time."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.shapes import Work, with_steps

Step = dict[str, Any]  # what a gate reports
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRL_EXPERIMENTAL_SILENCE": "1",
}


class SideError(RuntimeError):
    """A side ended, or did not do its work."""


class Side:
    """A worker process that does a step when asked.

    Args:
        module: With ``run(work, gate)``.
        work: What it does.
        log: Where its output goes.
        python: Interpreter; null: ours.
    """

    def __init__(self, module: str, work: Work, log: Path, python: str | None = None) -> None:
        self.module, self.log = module, log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [python or sys.executable, "-m", "benchmarks.worker", module, work.to_json()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, **ENVIRONMENT},
                cwd=Path(__file__).parent.parent,
            )
        self.ready = self._read()

    def step(self) -> Step:
        """Do one step; returns what it cost."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> Step:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            raise SideError(f"{self.module} ended:\n" + "\n".join(self.log.read_text().splitlines()[-15:]))
        report: Step = json.loads(line)
        return report

    def close(self) -> None:
        """Let it end by itself, or end it."""
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def alternate(
    sides: Mapping[str, str],
    work: Work,
    warmup: int,
    repeats: int,
    logs: Path,
    pythons: Mapping[str, str] | None = None,
) -> dict[str, list[Step]]:
    """Measure sides step by step in turn.

    Args:
        sides: Name to module.
        work: Of a step.
        warmup: Steps that are run first and not counted.
        repeats: Steps that are counted, of each side.
        logs: Folder of the sides' output.
        pythons: Name to interpreter, where it is not ours.

    Returns:
        The counted steps of each side.

    Raises:
        SideError: A side ended, or did other work than asked.
    """
    logs.mkdir(parents=True, exist_ok=True)
    work = with_steps(work, warmup + repeats)
    with ExitStack() as stack:
        running = {}
        for name, module in sides.items():
            running[name] = Side(module, work, logs / f"{name}.log", (pythons or {}).get(name))
            stack.callback(running[name].close)
        steps: dict[str, list[Step]] = {name: [] for name in sides}
        for _ in range(work.steps):
            for name, side in running.items():
                steps[name].append(checked(name, side.step(), work))
    return {name: done[warmup:] for name, done in steps.items()}


def checked(name: str, step: Step, work: Work) -> Step:
    """A step that did the work.

    Raises:
        SideError: It did not.
    """
    wanted = work.rows * work.new_tokens
    if step["tokens"] != wanted if work.fixed_length else not work.rows <= step["tokens"] <= wanted:
        raise SideError(f"{name} sampled {step['tokens']} tokens, {wanted} were asked for")
    for fact in ("moved", "finite"):
        if not step.get(fact, True):
            raise SideError(f"{name}: the step's weights or gradients are wrong ({fact} is false)")
    return step
