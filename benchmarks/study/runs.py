"""The study's training runs on the toy: every condition on several bases, with the weights of every step.

    python benchmarks/study/runs.py --seeds 5 6 7 8 9 --conditions self_certainty token_entropy --out runs-study

A run is the shipped quickstart (120 steps) with the changes of its condition, base ``toy:k`` and run seed k.
Nothing is evaluated while training: accuracy.py does that afterwards from the kept weights, with as many samples as
it takes. Runs that are already there are kept, so the study can be interrupted, extended and shared out over
processes (each run is claimed by a lock file).
"""

import argparse
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import save_file

sys.path.append(str(Path(__file__).parent))
from conditions import CONDITIONS, Condition
from toys import PROBLEMS

from rlif_lightning.cli.trainer import RLIFCLI

WEIGHTS = "weights"


class KeepWeights(Callback):
    """Saves the policy's weights before the first step and after each."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the start."""
        self._save(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save the step."""
        self._save(trainer, pl_module)

    def _save(self, trainer: Trainer, module: LightningModule) -> None:
        assert trainer.log_dir is not None
        folder = Path(trainer.log_dir) / WEIGHTS
        folder.mkdir(exist_ok=True)
        policy: Any = module.policy.model
        weights = {n: p.detach().clone() for n, p in policy.named_parameters() if p.requires_grad}
        save_file(weights, folder / f"{trainer.global_step}.safetensors")


def folder_of(root: Path, condition: str, seed: int) -> Path:
    """Where a finished run lies."""
    return root / condition / str(seed)


def train(condition: Condition, seed: int, folder: Path) -> None:
    """One run; appears under its name when it is complete."""
    work = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(work, ignore_errors=True)
    arguments = ["fit", "--config", "quickstart", "--runs", str(work), "--seed_everything", str(seed)]
    arguments += condition.arguments
    model = condition.model(seed, folder.parents[1])
    arguments += ["--model.name", model]  # after recipes that name another
    own = {split: Path(model) / file for split, file in PROBLEMS.items()}
    arguments += [f"--data.{split}.path={path}" for split, path in own.items() if path.exists()]
    arguments += ["--data.val", "null", "--completions.keep", "null", "--trainer.enable_progress_bar", "false"]
    arguments += ["--checkpoint.every", "100000", "--trainer.callbacks+=runs.KeepWeights"]
    RLIFCLI.run(arguments)
    (run,) = work.glob("*/1")
    run.rename(folder)
    shutil.rmtree(work)


def main() -> None:
    """Train what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--conditions", nargs="+", choices=list(CONDITIONS), default=list(CONDITIONS))
    parser.add_argument("--out", type=Path, default=Path("runs-study"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in options.seeds:
        for name in options.conditions:
            folder = folder_of(options.out, name, seed)
            lock = folder.with_name(f".{seed}.lock")
            lock.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.touch(exist_ok=False)
            except FileExistsError:
                continue
            if folder.exists():
                continue
            start = time.perf_counter()
            try:
                train(CONDITIONS[name], seed, folder)
            except BaseException:
                lock.unlink()
                raise
            print(f"{name}, seed {seed}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
