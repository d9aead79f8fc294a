"""A progress bar that counts optimiser steps and says what it waits for."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

SHOWN = {
    "reward": "rollout/reward",
    "entropy": "rollout/entropy",
    "accuracy": "rollout/accuracy",
    "val": "val/accuracy_sampled",
}


class StepProgressBar(TQDMProgressBar):
    """One bar over the optimiser steps of the run, with reward, entropy and, where known, accuracy."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar at the step that the run starts from."""
        total = pl_module._total_steps()  # type: ignore[operator]
        self.train_progress_bar = self.init_train_tqdm()
        self.train_progress_bar.unit = "step"
        self.train_progress_bar.total = total
        self.train_progress_bar.initial = self.train_progress_bar.n = trainer.global_step
        self.train_progress_bar.set_description("Training")

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Epochs do not restart the bar."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """A rollout has been collected, if one was due: show its numbers."""
        self._show(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Move on when an optimiser step was taken."""
        self.train_progress_bar.update(trainer.global_step - self.train_progress_bar.n)
        self._show(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Epochs do not close the bar."""

    def sampling(self, token: int, most: int) -> None:
        """How far a rollout is; shown every few tokens."""
        if not self.is_disabled and token % 16 == 0:
            self.train_progress_bar.set_description(f"Sampling {token}/{most}")
            if token + 16 > most:
                self.train_progress_bar.set_description("Training")

    def _show(self, trainer: Trainer) -> None:
        values = trainer.callback_metrics
        shown = {k: f"{float(values[v]):.3f}" for k, v in SHOWN.items() if v in values}
        self.train_progress_bar.set_description("Training", refresh=False)
        self.train_progress_bar.set_postfix(shown)
