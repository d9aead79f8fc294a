"""Checkpoints that a run can be continued from bit by bit."""

import os
from contextlib import ExitStack, nullcontext, suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.call import _call_callbacks_state_dict
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from rlif_lightning.callbacks.early_stopping import ask_early_stopping, check_early_stopping
from rlif_lightning.callbacks.ending import end_again
from rlif_lightning.callbacks.logging import run_folder, run_logger, tolerate_other_loggers
from rlif_lightning.callbacks.trained_problems import check_problems, problem_marks
from rlif_lightning.errors import UserError, check_ranges
from rlif_lightning.models.checkpoints import AtomicCheckpointIO
from rlif_lightning.runs import signals
from rlif_lightning.runs.atomic import copy_file, sync
from rlif_lightning.runs.folder import CHECKPOINTS, CONFIG, LAST_CHECKPOINT, METRICS, ROWS, numbered_checkpoints
from rlif_lightning.runs.peers import Peers


class RolloutCheckpoint(Checkpoint):
    """Saves checkpoints between rollouts, where a run can be continued exactly.

    A continued run takes the optimiser's state and the place in the schedule from the checkpoint, and settings
    that have been changed since (learning rate, weight decay, betas ...) from the recipe and the command line.
    ``last.ckpt`` is always the newest; a new run saves its start. A save that falls due within a rollout waits for
    its end. Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 end the run: a rollout of which no step was taken yet is dropped, and
    the weights before it are saved; else its steps are finished and saved. A second signal ends the run at once.

    Args:
        every: Optimiser steps between two checkpoints; the end of training is always saved.
        keep: Checkpoints to keep under the number of their step, the newest ones; null: all. The newest is that of
            ``last.ckpt`` (one file with two names), so 2 keeps the one before as well.
    """

    def __init__(self, every: int = 10, keep: int | None = 2) -> None:
        check_ranges(
            "checkpoint",
            ("every", every, every >= 1, "1 or more"),
            ("keep", keep, keep is None or keep >= 0, "0 or more, or null"),
        )
        self.every, self.keep = every, keep
        self._saved_step = -1
        self._signals = ExitStack()
        self._boundary: dict[str, Any] = {}  # what a checkpoint of the end of the last rollout holds, but for weights
        self._instead: dict[str, Any] = {}  # of what a checkpoint would hold otherwise
        self._at_boundary, self._stop_later = True, False
        self._problems: Tensor | None = None  # marks of those that this run trains on
        self._optimizers: list[dict[str, Any]] = []  # as configured for this run
        self._stored: list[dict[str, Any]] = []  # as configured when the checkpoint was written

    def state_dict(self) -> dict[str, Any]:
        """How the optimisers were configured, and on what: a continued run must know what has been changed since."""
        return {"optimizers": self._optimizers, "problems": self._problems}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it from the checkpoint."""
        self._stored = state_dict["optimizers"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write and read checkpoints safely; take signals over from Lightning."""
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        # Its handlers would stop within a rollout, and let SLURM begin the job anew from a file of their own.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        self._signals.enter_context(signals.handled())
        several = trainer.world_size > 1
        self._signals.enter_context(signals.shared_with(Peers(trainer.strategy.root_device) if several else None))
        if stage == "fit":
            end_again(trainer)
            tolerate_other_loggers(trainer)
            check_early_stopping(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        self._signals.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """A signal or an error ends the run: save the end of the last rollout, if its weights are still there.

        Not after an error in one of several processes: the others are somewhere else.
        """
        signals.hold("later")
        stopped = isinstance(exception, signals.Stopped)
        if self._saved_step >= 0 and (stopped or trainer.world_size == 1):
            unsaved = self._boundary.get("global_step") == trainer.global_step != self._saved_step
            if unsaved:
                self._instead = self._boundary
                with nullcontext() if stopped else suppress(Exception):  # the error itself says more
                    self._save(trainer)
            if stopped or unsaved:
                who = signals.name_of(exception.number) if isinstance(exception, signals.Stopped) else "an error"
                rank_zero_info(f"Stopped by {who} after step {self._saved_step}; continue with --ckpt_path last")
        self._signals.close()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Of a rollout that is dropped, the checkpoint knows nothing."""
        checkpoint.update(self._instead)

    def on_load_checkpoint(self, trainer: Any, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Count the batches so far as this run cuts its rollouts: its slices or processes may be others."""
        if not trainer.training:
            return
        if not check_problems(trainer, checkpoint):
            rank_zero_info("The checkpoint does not say on which problems it was trained: they are not compared.")
        plan, loop = trainer.datamodule.plan, checkpoint["loops"]["fit_loop"]
        (place,) = loop["state_dict"]["combined_loader"]
        before, here = place["world_size"], trainer.world_size
        if before != here:
            dealt = plan.steps_per_rollout > 1
            rank_zero_info(
                f"Continued by {here} process{'es' if here > 1 else ''}; the checkpoint was written by {before}. "
                "The same prompts follow, but the run is no longer the same bit by bit"
                + (", and a rollout's prompts come in another order." if dealt else ".")
            )
        was, now = place["rollout_batches"], plan.rollout_batches
        for counts in (loop["epoch_loop.batch_progress"][k] for k in ("total", "current")):
            rollouts = counts["ready"] // was
            counts.update({k: n + rollouts * (now - was) for k, n in counts.items()})

    def on_fit_start(self, trainer: Any, pl_module: LightningModule) -> None:
        """Note how the optimisers are configured, before the checkpoint's settings take their place."""
        self._problems = problem_marks(trainer.datamodule.prompts["train"])
        self._optimizers = [configuration(optimizer) for optimizer in trainer.optimizers]
        for now, was in zip(self._optimizers, self._stored, strict=False):
            if now["class"] != was["class"]:
                raise UserError(
                    "The checkpoint holds the state of another optimiser",
                    got=was["class"],
                    expected=now["class"],
                    do="continue with the optimiser that the run began with, or begin a new run",
                )

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Bring changed settings back; save a new run's start."""
        for optimizer, now, was in zip(trainer.optimizers, self._optimizers, self._stored, strict=False):
            changes = apply_changes(optimizer, now["groups"], was["groups"])
            if changes and not (run_folder(trainer) / CONFIG).is_file():  # else the command line tells them
                rank_zero_info(f"Changed since the checkpoint: {', '.join(changes)}")
        for config in trainer.lr_scheduler_configs if self._stored else []:
            if isinstance(config.scheduler, LambdaLR):
                recompute_rates(config.scheduler)
        self._stored = []
        self._saved_step, self._at_boundary, self._stop_later = trainer.global_step, True, False
        self._boundary, self._instead = {}, {}
        self._make_last(trainer)
        if not trainer.ckpt_path:
            self._save(trainer)
        signals.hold("at a look")  # what is sampled from here on may be dropped

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """From here on the weights are no longer those of the end of the last rollout."""
        self._boundary = {}
        signals.hold("later")

    def _make_last(self, trainer: Trainer) -> None:
        """A run that goes back to an older checkpoint gives up what came after it, before its logs are cut."""
        folder = run_folder(trainer) / CHECKPOINTS
        start = Path(trainer.ckpt_path) if trainer.ckpt_path else None
        if not trainer.is_global_zero or start is None or start.name == LAST_CHECKPOINT:
            return
        if folder.is_dir() and start.parent.samefile(folder):
            copy_file(start, folder / LAST_CHECKPOINT)
            self._give_up(folder, trainer.global_step + 1)

    @staticmethod
    def _give_up(folder: Path, step: int) -> dict[int, Path]:
        """Remove numbered checkpoints from a step on; returns the others."""
        steps = numbered_checkpoints(folder)
        for n in [n for n in steps if n >= step]:
            steps.pop(n).unlink()
        return steps

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save where due; stop where asked to, and where others have asked the Trainer to within the rollout."""
        self._at_boundary = batch["last"]
        if not self._at_boundary:
            self._stop_later = self._stop_later or trainer.should_stop
            trainer.should_stop = False
            return
        trainer.should_stop = trainer.should_stop or self._stop_later
        ask_early_stopping(trainer, pl_module)
        self._boundary, number = {}, signals.agreed()
        logs_fail = getattr(run_logger(trainer), "failure", None) is not None  # a disk that takes no more
        trainer.should_stop |= trainer.strategy.reduce_boolean_decision(logs_fail, all=False)
        ends = trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step
        if number or ends or trainer.global_step - self._saved_step >= self.every:
            self._save(trainer)
        else:
            loops = trainer._checkpoint_connector._get_loops_state_dict()
            state = {"loops": loops, "callbacks": _call_callbacks_state_dict(trainer)}
            self._boundary = deepcopy({"epoch": trainer.current_epoch, "global_step": trainer.global_step, **state})
        if number:
            raise signals.Stopped(number)
        signals.hold("at a look")  # what is sampled from here on may be dropped

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Save the end, if that has not been done before the last evaluation; tell of a disk that took no logs."""
        self._boundary = {}
        if (self._saved_step != trainer.global_step or pl_module.is_replaced) and self._at_boundary:
            self._save(trainer)
        elif not self._at_boundary:
            rank_zero_warn(
                f"Training ended within a rollout: the newest checkpoint is that of step {self._saved_step}."
            )
        failure = getattr(run_logger(trainer), "failure", None)
        if failure is not None:
            raise failure
        signals.hold("at once")
        signals.look()

    def _save(self, trainer: Trainer) -> None:
        run = run_folder(trainer)
        folder, step = run / CHECKPOINTS, trainer.global_step
        if trainer.is_global_zero:
            for log in (METRICS, *ROWS):  # a continued run cuts them back to the checkpoint's step
                sync(run / log)
        trainer.save_checkpoint(folder / LAST_CHECKPOINT, weights_only=False)  # False: the optimiser as well
        self._saved_step = step
        trainer.lightning_module.is_replaced = False  # type: ignore[assignment]
        if not trainer.is_global_zero:
            return
        steps = self._give_up(folder, step)
        if self.keep == 0 or step == 0:
            return
        numbered = steps[step] = folder / f"step={step}.ckpt"
        try:  # last.ckpt is replaced, never rewritten, so the link stays whole
            os.link(folder / LAST_CHECKPOINT, numbered)
        except OSError:  # a file system without links
            copy_file(folder / LAST_CHECKPOINT, numbered)
        for old in sorted(steps)[: -self.keep] if self.keep else []:
            steps[old].unlink()


# -- an optimiser's settings when a run continues: what was changed since the checkpoint wins, the rest stays -----


def configuration(optimizer: Optimizer) -> dict[str, Any]:
    """The class of an optimiser and the settings of its groups; the learning rate is that of the start."""
    kind = type(optimizer)
    groups = [
        {k: v for k, v in group.items() if k not in ("params", "initial_lr")}
        | {"lr": group.get("initial_lr", group["lr"])}
        for group in optimizer.param_groups
    ]
    return {"class": f"{kind.__module__}.{kind.__qualname__}", "groups": groups}


def apply_changes(optimizer: Optimizer, now: list[dict[str, Any]], was: list[dict[str, Any]]) -> list[str]:
    """Set what is configured otherwise now than in the checkpoint, and say what that is.

    Everything else stays as restored: an optimiser may keep state of its own next to its settings.
    """
    said = []
    for group, new, old in zip(optimizer.param_groups, now, was, strict=True):
        for key, value in new.items():
            if value != old.get(key):
                group["initial_lr" if key == "lr" and "initial_lr" in group else key] = value
                said.append(f"{key} {old.get(key)} -> {value}")
    return said


def recompute_rates(scheduler: LambdaLR) -> None:
    """Compute the current step's learning rate from the schedule as it is configured now.

    If nothing was changed, this is the restored rate to the last bit.
    """
    groups = scheduler.optimizer.param_groups
    scheduler.base_lrs = [group["initial_lr"] for group in groups]
    shares = [share(scheduler.last_epoch) for share in scheduler.lr_lambdas]
    scheduler._last_lr = [base * share for base, share in zip(scheduler.base_lrs, shares, strict=True)]
    for group, lr in zip(groups, scheduler._last_lr, strict=True):
        group["lr"] = lr
