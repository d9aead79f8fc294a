"""Checkpoints that a run can be continued from bit by bit."""

import os
import signal
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from rlif_lightning.callbacks.rollout import RolloutCallback

from rlif_lightning.errors import UserError

LAST = "last.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames: a full disk or a kill never costs the checkpoint before.

    Lightning writes through the system's temporary folder; moving from there onto a full disk destroys the
    previous file. Loading never runs pickled code.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
        """Read tensors and plain values only."""
        return torch.load(path, map_location=map_location or "cpu", weights_only=True)


class RolloutCheckpoint(Checkpoint):
    """Saves at the boundary of a rollout, where a run can be continued exactly.

    ``last.ckpt`` is always the newest. A save that falls due within a rollout waits for its end; SIGTERM asks
    for a save at the next boundary and then stops the run (a second SIGTERM ends it at once).

    Args:
        every: Optimiser steps between two saves; the end of training is always saved.
        keep: Also keep this many numbered checkpoints, the newest; null: all.
    """

    def __init__(self, every: int = 10, keep: int | None = 0) -> None:
        if every < 1:
            raise UserError("checkpoint.every is too small", got=every, expected="1 or more")
        self.every, self.keep = every, keep
        self._saved_step = -1
        self._asked_to_stop = False
        self._rollout: RolloutCallback | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write and read checkpoints safely; find out who knows the boundaries."""
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        self._rollout = next((c for c in trainer.callbacks if isinstance(c, RolloutCallback)), None)  # type: ignore[attr-defined]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take SIGTERM over from Lightning, which would end the run in the middle of a rollout."""
        self._saved_step = trainer.global_step
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._on_sigterm)

    def _on_sigterm(self, number: int, frame: Any) -> None:
        if self._asked_to_stop:
            raise SystemExit(128 + number)
        self._asked_to_stop = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save where due; stop where asked to."""
        if self._rollout is None or not self._rollout.at_boundary:
            return
        stop = trainer.strategy.reduce_boolean_decision(self._asked_to_stop, all=False)
        if stop or trainer.global_step - self._saved_step >= self.every:
            self._save(trainer)
        if stop:
            rank_zero_info(f"Stopped by SIGTERM after step {trainer.global_step}; continue with --ckpt_path last")
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end."""
        if self._saved_step == trainer.global_step:
            return
        if self._rollout is not None and self._rollout.at_boundary:
            self._save(trainer)
        else:
            rank_zero_warn(
                f"Training ended within a rollout: the newest checkpoint is that of step {self._saved_step}."
            )

    def _save(self, trainer: Trainer) -> None:
        folder = Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints"
        step = self._saved_step = trainer.global_step
        trainer.save_checkpoint(folder / LAST)
        if self.keep == 0 or not trainer.is_global_zero:
            return
        numbered = folder / f"step={step}.ckpt"
        numbered.unlink(missing_ok=True)
        os.link(folder / LAST, numbered)  # last.ckpt is replaced, never rewritten, so the link stays whole
        kept = sorted(folder.glob("step=*.ckpt"), key=lambda p: int(p.stem.split("=")[1]))
        for old in kept[: -self.keep] if self.keep else []:
            old.unlink()
