"""Lightning's EarlyStopping among rollouts: asked after those that logged what it watches."""

from typing import Any

from rlif_lightning.callbacks.progress import say_above_bar
from rlif_lightning.errors import UserError


def check_early_stopping(trainer: Any, module: Any) -> None:
    """Take EarlyStopping over from Lightning, which would ask it after an epoch; refuse it without evaluations."""
    for stopping in trainer.early_stopping_callbacks:
        stopping._check_on_train_epoch_end = False
        evaluates = trainer.datamodule.prompts.get("val") and module.evaluation and module.evaluation.every
        if stopping.monitor.startswith("val/") and not evaluates:
            do = "set --data.val.path and --evaluation.every, or watch a metric of rollouts such as rollout/reward"
            got = f"monitor {stopping.monitor}"
            raise UserError("EarlyStopping watches evaluations, and there are none while training", got=got, do=do)


def ask_early_stopping(trainer: Any, module: Any) -> None:
    """Between two rollouts: let it look at its metric if that is new, and refuse one that does not exist."""
    for stopping in trainer.early_stopping_callbacks:
        if stopping.monitor.startswith("val/") and module.evaluation.latest_step != trainer.global_step:
            continue
        if stopping.monitor not in trainer.callback_metrics and stopping.strict:
            raise UserError(
                "EarlyStopping watches a metric that this run does not log",
                got=f"monitor {stopping.monitor}",
                expected=", ".join(sorted(trainer.callback_metrics)),
                do="correct its monitor",
            )
        stopped = trainer.should_stop
        stopping.on_validation_end(trainer, module)
        if trainer.should_stop and not stopped:
            why = stopping.stopping_reason_message
            say_above_bar(f"EarlyStopping ends the run after step {trainer.global_step}: {why}")
