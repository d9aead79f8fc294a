"""``rlif fit`` in several processes, with what each of them has seen; what hangs is killed."""

import atexit
import contextlib
import csv
import functools
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

SAID = "said"
MAIN = Path(__file__).parents[1] / "rlif_lightning" / "__main__.py"
UNCOMPARED = ("time/", "memory/", "rollout/tokens_per_second")
PRELOADED = [
    "rlif_lightning.cli.trainer", "matplotlib.pyplot", "torch.utils.tensorboard",
    "transformers.models.qwen2.modeling_qwen2",
]  # fmt: skip

# Runs `rlif` in each process; each notes its rollouts, and all can be killed in a micro-batch, or one of them.
SCRIPT = """
import json, os, sys
import torch
torch.set_num_threads(1)
from rlif_lightning.callbacks.guard import CollapseGuard
from rlif_lightning.callbacks.rollout import RolloutCallback
from rlif_lightning.main import main
from rlif_lightning.training.module import RLIFModule
from rlif_lightning.models.trainable import local_shard, trainable_weights

collect, step, calls = RolloutCallback._collect, RLIFModule.training_step, []
kill_at, kill_rank, notes = int(os.environ["KILL_AT"]), os.environ["KILL_RANK"], os.environ["NOTES"]

def noted(self, trainer, module, batch):
    collected = collect(self, trainer, module, batch)
    r = collected.rollout
    row = {"step": trainer.global_step, "rank": trainer.global_rank, "folder": trainer.log_dir,
           "held": sum(local_shard(p).numel() for p in module.policy.model.parameters()),
           "prompts": [p.text for p in batch["prompts"]], "texts": r.texts, "lengths": r.samples.lengths.tolist(),
           "rewards": next(iter(r.rewards.values())).tolist(), "entropy": float(r.samples.stats.entropy.sum())}
    with open(f"{notes}.{trainer.global_rank}", "a") as file:
        file.write(json.dumps(row) + "\\n")
    return collected

def counted(self, batch, batch_idx):
    calls.append(1)
    if len(calls) == kill_at and kill_rank in ("all", str(self.global_rank)):
        os._exit(9)
    return step(self, batch, batch_idx)

def ended(self, trainer, module):
    train_end(self, trainer, module)
    torch.save(trainable_weights(module.policy.model), f"{notes}.end.{trainer.global_rank}")

train_end, CollapseGuard.on_train_end = CollapseGuard.on_train_end, ended
RolloutCallback._collect, RLIFModule.training_step = noted, counted
main(sys.argv[1:])
"""


class Processes:
    """Runs of a tiny model in a folder.

    Args:
        root: The folder.
        model: The model's.
        problems: A file of problems.
        strategy: Of several processes.
    """

    def __init__(self, root: Path, model: Path, problems: Path, strategy: str = "ddp") -> None:
        self.root, self.strategy = root, strategy
        self.script = root / "train.py"
        self.script.write_text(SCRIPT)
        self.arguments = [
            "--model.name", model, "--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=0.03",
            "--model.optimizer.eps=0.01", "--model.kl_coefficient=0.01", "--model.schedule=cosine",
            "--data.train.path", problems, "--data.train.gold", r"[#]{4}\s*(.+)", "--data.train.limit=13",
            "--data.val.path", problems, "--data.val.gold", r"[#]{4}\s*(.+)",
            "--data.answers.completion=last_number", "--data.template={prompt} ",
            "--rollout.prompts_per_step=4", "--rollout.group_size=4", "--rollout.max_new_tokens=40",
            "--rollout.micro_batch_size=4", "--rollout.temperature=2.0", "--completions.keep=null",
            "--evaluation.max_new_tokens=6", "--evaluation.every=2", "--evaluation.n=5", "--checkpoint.every=1",
            "--trainer.gradient_clip_val=1.0", "--trainer.accelerator=cpu", "--trainer.max_steps=5",
            "--trainer.enable_progress_bar=false",
        ]  # fmt: skip

    def environment(self, notes: str, kill_at: int = 0, kill_rank: str = "all") -> dict[str, str]:
        """Of a process that notes its rollouts under a name."""
        own = {
            "OMP_NUM_THREADS": "1",
            "KILL_AT": str(kill_at),
            "KILL_RANK": kill_rank,
            "NOTES": str(self.root / notes),
        }
        return {**os.environ, **own}

    def __call__(
        self,
        runs: str,
        *settings: object,
        processes: int = 2,
        strategy: str | None = None,
        kill_at: int = 0,
        command: str = "fit",
        seconds: float = 600,
        launched: bool = False,
    ) -> "Result":
        """Run a command in a folder of runs. All that is left is killed.

        ``launched``: as a user starts it, where Lightning starts the other processes; otherwise all are forks.
        """
        devices = ["--trainer.devices", processes]
        devices += [f"--trainer.strategy={strategy or self.strategy}"] if processes > 1 else []
        words = [self.script, command, *used_by(command, self.arguments), *devices, "--runs", runs, *settings]
        environment = self.environment(runs, kill_at)
        if launched:
            started = start([sys.executable, *words], self.root, environment)
            said, code = "".join(finish(started, seconds)), started.returncode
        else:
            said, code = forked(words, self.root, environment, processes, seconds)
        if command == "fit":
            assert (code == 0) == (kill_at == 0), said[-3000:]
        return Result(self.root / runs, processes, said, code)


def used_by(command: str, words: Iterable[object]) -> list[str]:
    """Those of a fit's words that a command takes as well: validate, test and predict refuse what they do not use."""
    from rlif_lightning.cli.given_names import UNUSED, check_names
    from rlif_lightning.errors import UserError

    if command not in UNUSED:
        return [*map(str, words)]
    kept: list[str] = []
    used = True
    for word in map(str, words):
        if word.startswith("--"):
            try:
                check_names(command, [word])
                used = True
            except UserError:
                used = False
        kept += [word] if used else []
    return kept


def start(words: list[Any], folder: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    """Start a command at the head of a process group of its own."""
    return subprocess.Popen(
        [str(word) for word in words], cwd=folder, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: subprocess.Popen[str], seconds: float) -> tuple[str, str]:
    """Wait for its end; whatever of its group is left then is killed. Returns output and errors."""
    try:
        return process.communicate(timeout=seconds)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def forked(
    words: list[Any], folder: Path, environment: dict[str, str], processes: int = 1, seconds: float = 600
) -> tuple[str, int]:
    """Run a Python file in forks of a process that has imported everything: they cost their own work alone.

    With the variables that Lightning's launcher sets. Returns what they said, and the first one's exit code.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    (folder / SAID).unlink(missing_ok=True)
    ranks = []
    for rank in range(processes):
        own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0", "LOCAL_RANK": str(rank),
               "WORLD_SIZE": str(processes)}  # fmt: skip
        ranks.append(fork(words, folder, {**environment, **(own if processes > 1 else {})}))
    try:
        for process in ranks:
            process.join(seconds)
    finally:
        for process in ranks:
            process.kill()
            process.join()
    return (folder / SAID).read_text(errors="replace"), ranks[0].exitcode


def fork(words: list[Any], folder: Path, environment: dict[str, str]) -> Any:
    """Start a Python file in such a fork; the process adds what it says to the folder's file ``SAID``."""
    process = forks().Process(target=_run, args=([str(word) for word in words], folder, environment))
    process.start()
    return process


@functools.cache
def forks() -> Any:
    """The context of forks of one process, which has imported what a run imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def draw_blank(folders: Any, output: Path) -> None:
    """Make the figure of runs, and an empty file where its picture would be."""
    from rlif_lightning.runs.curves import curves_figure

    curves_figure(folders)
    output.touch()


def _run(words: list[str], folder: Path, environment: dict[str, str]) -> None:
    """Run a Python file in this process as one of its own."""
    from lightning.pytorch.utilities import rank_zero_only

    from rlif_lightning.runs import curves

    with (folder / SAID).open("ab") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    rank_zero_only.rank = int(environment.get("LOCAL_RANK", 0))
    curves.draw_curves = draw_blank
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a fork leaves them out


class Result:
    """What the processes of a run have left."""

    def __init__(self, runs: Path, processes: int, said: str, code: int) -> None:
        self.runs, self.said, self.code, self.folder = runs, said, code, runs / "run" / "1"
        self.notes = [
            [json.loads(line) for line in path.read_text().splitlines()]
            for path in (Path(f"{runs}.{rank}") for rank in range(processes))
            if path.exists()
        ]

    @property
    def checkpoint(self) -> dict[str, Any]:
        """The last one."""
        return read(self.folder / "checkpoints" / "last.ckpt")

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """Those of the last checkpoint."""
        return self.checkpoint["state_dict"]

    @property
    def table(self) -> list[dict[str, str]]:
        """metrics.csv without times and memory."""
        with (self.folder / "metrics.csv").open() as file:
            return [{k: v for k, v in row.items() if not k.startswith(UNCOMPARED)} for row in csv.DictReader(file)]

    def copy(self, runs: str, step: int) -> str:
        """Copy the run as if it had been killed after a step whose checkpoint it has kept; returns the new name."""
        target = self.runs.with_name(runs)
        shutil.copytree(self.runs, target)
        checkpoints = target / "run" / "1" / "checkpoints"
        for path in checkpoints.glob("*.ckpt"):
            if path.name != f"step={step}.ckpt":
                path.unlink()
        (checkpoints / f"step={step}.ckpt").rename(checkpoints / "last.ckpt")
        return runs

    def ends(self) -> list[dict[str, torch.Tensor]]:
        """The weights of each process at the end of training."""
        return [read(f"{self.runs}.end.{rank}") for rank in range(len(self.notes))]


def read(path: str | Path) -> Any:
    """A file of torch.save."""
    return torch.load(path, weights_only=True)


def differences(one: Result, other: Result) -> list[tuple[str, str, str | None, str | None]]:
    """Metrics that are not the same, as (step, name, one, other)."""
    a, b = one.table, other.table
    assert [row["step"] for row in a] == [row["step"] for row in b]
    return [
        (x["step"], name, x.get(name), y.get(name))
        for x, y in zip(a, b, strict=True)
        for name in {**x, **y}
        if x.get(name) != y.get(name)
    ]


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Of any weight."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def assert_same_state(one: Result, other: Result) -> None:
    """Weights and optimiser states agree bit by bit."""
    a, b = one.checkpoint, other.checkpoint
    assert largest_difference(a["state_dict"], b["state_dict"]) == 0
    states = [x["optimizer_states"][0]["state"] for x in (a, b)]
    assert states[0].keys() == states[1].keys() and states[0]
    for number, own in states[0].items():
        assert all(torch.equal(own[key], states[1][number][key]) for key in own)
