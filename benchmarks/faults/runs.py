"""Runs that faults are injected into: forks of a process that has imported everything.

A run costs its own work alone, not that of the imports, and its parent sees in which part of the work it is. It calls
``rlif_lightning.main`` with the words of a command line. Nothing here runs in the harness's own process.
"""

import atexit
import functools
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

FORK = multiprocessing.get_context("fork")

SMALL = [
    "--config", "quickstart", "--trainer.max_steps=12", "--checkpoint.every=3", "--evaluation.every=6",
    "--evaluation.n=20", "--guard.warmup=1", "--rollout.prompts_per_step=8", "--rollout.group_size=4",
    "--trainer.enable_progress_bar=false",
]  # fmt: skip
TINY = [
    "--trainer.max_steps=4", "--checkpoint.every=1", "--evaluation.every=2", "--evaluation.n=4",
    "--rollout.prompts_per_step=2", "--rollout.group_size=2", "--rollout.max_new_tokens=8",
]  # fmt: skip

PARTS = {
    "loading": "rlif_lightning.training.module:RLIFModule.configure_model",
    "toy": "rlif_lightning.toy.pretraining:build_toy",
    "rollout": "rlif_lightning.training.collector:Collector.collect",
    "update": "rlif_lightning.training.module:RLIFModule.training_step",
    "metrics": "rlif_lightning.runs.logger:RunLogger.log_metrics",
    "completions": "rlif_lightning.callbacks:Completions.on_train_batch_start",
    "evaluation": "rlif_lightning.evaluation.answering:answer_problems",
    "checkpoint": "lightning.pytorch:Trainer.save_checkpoint",
    "guard": "rlif_lightning.guard.kept_weights:KeptWeights.write",
    "report": "rlif_lightning.callbacks:Report.on_fit_end",
    "sampling": "rlif_lightning.sampling:NativeSampler.sample",
    "files": "os:replace os:rename os:link os:unlink os:fsync",
}
"""Parts of a run's work, and the functions that do them."""
WITHIN = ("sampling", "files")  # of other parts: counted, but not where a run is said to be

HANGS = 1800.0
"""Seconds after which a run counts as one that hangs: building the toy takes some minutes on a busy machine."""

Tell = Callable[[str, int, bool], None]
"""Told of a call: its part, the how manieth of this part it is (from 1), and whether it has ended."""


def preload(toy: bool) -> None:
    """Import what a run imports, nothing that starts a thread; build the toy, if it is wanted, in another process."""
    import torch

    torch.set_num_threads(1)
    for module in (
        "rlif_lightning.cli.trainer", "rlif_lightning.commands.export", "rlif_lightning.commands.diagnose",
        "rlif_lightning.commands.mix", "matplotlib.pyplot", "torch.utils.tensorboard",
        "transformers.models.llama.modeling_llama", *(place.partition(":")[0] for place in PARTS.values()),
    ):  # fmt: skip
        import_module(module)
    if toy:
        from rlif_lightning.toy import toy_model

        build = FORK.Process(target=toy_model)
        build.start()
        build.join()


def untrained(name: str = "untrained", seed: int = 1) -> Path:
    """The folder of a model like the toy's that has learned nothing."""
    from rlif_lightning.toy.pretraining import build_toy

    folder = Path(name).absolute()
    if not folder.exists():
        folder.mkdir()
        build_toy(folder, [], seed, progress=False)
    return folder


class Calls:
    """Where a run is and how often each part was called, in memory that its parent sees."""

    def __init__(self) -> None:
        self._numbers = FORK.RawArray("i", 1 + len(PARTS))  # the current part, and the calls of each
        self.made: list[tuple[str, int, float]] = []  # part, number and seconds; known in the run's process alone

    @property
    def now(self) -> str:
        """The part that the run is in."""
        return ["between them", *PARTS][self._numbers[0]]

    def count(self, part: str) -> int:
        """How often it was called."""
        return self._numbers[1 + [*PARTS].index(part)]

    def watch(self, tell: Tell | None) -> None:
        """Wrap the functions; to be called in the run's process."""
        for number, (part, places) in enumerate(PARTS.items(), start=1):
            for place in places.split():
                module, path = place.split(":")
                *owners, name = path.split(".")
                owner = functools.reduce(getattr, owners, import_module(module))
                setattr(owner, name, self._watched(getattr(owner, name), part, number, tell))
        if tell is not None:
            tell("run", 1, False)

    def _watched(self, function: Any, part: str, number: int, tell: Tell | None) -> Any:
        @functools.wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            before, start = self._numbers[0], time.perf_counter()
            if part not in WITHIN:
                self._numbers[0] = number
            self._numbers[number] += 1
            nth = self._numbers[number]
            if tell is not None:
                tell(part, nth, False)
            try:
                return function(*args, **kwargs)
            finally:
                self.made.append((part, nth, time.perf_counter() - start))
                if tell is not None:
                    tell(part, nth, True)
                self._numbers[0] = before

        return watched


class Run:
    """A command in a process of its own.

    Args:
        words: Of the command line, after ``rlif``.
        log: File for what it says.
        tell: Called in the run at every call of a part.
        prepare: Called in the run before the command.
        environment: Variables to add.
    """

    def __init__(
        self,
        words: Sequence[object],
        log: str,
        tell: Tell | None = None,
        prepare: Callable[[Calls], None] | None = None,
        **environment: str,
    ) -> None:
        self.words, self.log, self.calls, self.hangs = [str(word) for word in words], Path(log), Calls(), False
        arguments = (tell, prepare, environment)
        self.process = FORK.Process(target=self._command, args=arguments, daemon=True)  # ends with the harness
        self.process.start()

    def _command(self, tell: Tell | None, prepare: Any, environment: dict[str, str]) -> None:
        from rlif_lightning.main import main

        os.setsid()  # Ctrl-C is the harness's business
        with self.log.open("wb") as file:
            os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
        os.environ.update(environment)
        self.calls.watch(tell)
        if prepare is not None:
            prepare(self.calls)
        try:
            main(self.words)
        finally:
            atexit._run_exitfuncs()  # a fork leaves them out

    def until(self, part: str, nth: int = 1, seconds: float = HANGS) -> "Run":
        """Wait for a call of a part, or for the end."""
        end = time.monotonic() + seconds
        while self.process.is_alive() and self.calls.count(part) < nth and time.monotonic() < end:
            time.sleep(0.001)
        return self

    def send(self, number: signal.Signals) -> "Run":
        """Send a signal, if there is still somebody to get it."""
        if self.process.is_alive():
            os.kill(self.process.pid or 0, number)
        return self

    def wait(self, seconds: float = HANGS) -> "Run":
        """Wait for the end; what hangs is killed."""
        self.process.join(seconds)
        self.hangs = self.process.is_alive()
        if self.hangs:
            self.process.kill()
            self.process.join()
        return self

    @property
    def code(self) -> int:
        """The exit code; minus the number of the signal that it died of."""
        code = self.process.exitcode
        assert code is not None, "wait for the run first"
        return code

    @property
    def said(self) -> str:
        """All that it has printed."""
        return self.log.read_text(errors="replace")

    @property
    def traceback(self) -> bool:
        """Whether it has shown one."""
        return "Traceback (most recent call last)" in self.said

    @property
    def refused(self) -> bool:
        """Whether it has ended with an error and a paragraph about it."""
        return self.code > 0 and not self.traceback and "error: " in self.said

    @property
    def ending(self) -> str:
        """How it ended, in words; without paths of this machine."""
        lines = [text for text in self.said.splitlines() if text.strip()]
        error = next((text for text in reversed(lines) if text.startswith("error: ")), "error: ")
        words = f"exit {self.code}" if self.code >= 0 else f"killed by {signal.Signals(-self.code).name}"
        if self.hangs:
            words = "hangs"
        elif self.traceback:
            words += f", a traceback: {lines[-1]}"
        elif self.code > 0 and error != "error: ":
            words += f": {error.removeprefix('error: ')}"
        words = words.replace(f"{Path.cwd()}/", "").replace(str(Path.home()), "~")
        return re.sub(r"\s+", " ", words)[:160]


def start(words: Sequence[object], log: str) -> subprocess.Popen[bytes]:
    """The installed command as a user starts it, at the head of a process group of its own."""
    rlif = Path(sys.executable).with_name("rlif")
    with open(log, "wb") as file:
        return subprocess.Popen(
            [str(rlif), *map(str, words)], stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )


def children(pid: int, word: bytes = b"") -> list[int]:
    """Processes that a process has started and whose command line holds a word."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == pid and word in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:  # it has just ended
            continue
    return found


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def newest(runs: str | Path) -> Path:
    """The newest run folder below a folder of runs; one that is not there where there is none."""
    folders = [folder for folder in Path(runs).glob("*/*") if folder.name.isdigit()]
    return max(folders, key=lambda folder: int(folder.name), default=Path(runs) / "no run")


def again(run: Run, log: str, tell: Tell | None = None, **environment: str) -> Run:
    """Start a command once more as its user would: from its last checkpoint, if it has one."""
    runs = Path(run.words[run.words.index("--runs") + 1])
    checkpoint = any(runs.glob("*/*/checkpoints/last.ckpt")) and "--ckpt_path" not in run.words
    return Run([*run.words, *(["--ckpt_path", "last"] if checkpoint else [])], log, tell, **environment).wait()
