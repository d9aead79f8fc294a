"""Lightning's own callbacks and Trainer settings that do not work with rollouts."""

from lightning.pytorch import Trainer
from lightning.pytorch import callbacks as lightning

from rlif_lightning.errors import UserError

AVERAGES = (
    "its averages would take the place of the weights that sample and that checkpoints continue from",
    "leave it out; model.reference ema is a running mean to refer to",
)
REFUSED = {
    lightning.GradientAccumulationScheduler: (
        "it would take several rollouts for one optimiser step",
        "set --rollout.micro_batch_size, from which accumulation follows",
    ),
    lightning.StochasticWeightAveraging: AVERAGES,
    lightning.WeightAveraging: AVERAGES,
    lightning.BaseFinetuning: (
        "checkpoints, references and the guard hold the weights that train from the first step on",
        "choose what trains with --model.lora",
    ),
    lightning.ModelPruning: ("it takes weights out of the model while others read them there", "leave it out"),
    lightning.BatchSizeFinder: (
        "a rollout's sizes belong to what is trained",
        "set --rollout.micro_batch_size, which changes memory alone; rlif plan says what fits",
    ),
    lightning.LearningRateFinder: ("it would train on rollouts and throw them away", "set --model.optimizer.lr"),
    lightning.SpikeDetection: (
        "the loss of a rollout is near 0 by construction, whatever its size says",
        "leave it out; the guard watches rollouts",
    ),
    lightning.OnExceptionCheckpoint: (
        "it saves within a rollout, and a new run would continue from that file unasked",
        "set --checkpoint.every 1 and continue with --ckpt_path last",
    ),
}
"""Class: why it is refused, and what to do."""

ROWS = "take few problems with --limit, or data.*.limit in a recipe; in a fit with --evaluation.n"
SCHEDULE = "set --evaluation.every, in optimiser steps"
ONLY = {
    "fast_dev_run": ((False, 0), "set --trainer.max_steps 1, and data.*.limit for few problems"),
    "overfit_batches": ((0,), "set --data.train.limit: every epoch deals all of its problems"),
    "reload_dataloaders_every_n_epochs": ((0,), "leave it out: epochs are dealt anew by themselves"),
    "val_check_interval": ((1, None), SCHEDULE),
    "check_val_every_n_epoch": ((1,), SCHEDULE),
    "limit_val_batches": ((1,), ROWS),
    "limit_test_batches": ((1,), ROWS),
    "limit_predict_batches": ((1,), ROWS),
}
"""Settings of the Trainer that have no meaning here but for these values; what to set instead."""


def check_trainer(trainer: Trainer) -> None:
    """Refuse what would quietly train something else, before anything is read or loaded."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for kind, (why, do) in REFUSED.items():
            if isinstance(callback, kind):
                raise UserError(f"{type(callback).__name__} does not work with rollouts: {why}", do=do)
        if isinstance(callback, lightning.ModelCheckpoint) and callback.save_last and callback.dirpath is None:
            wrong = "Two callbacks would write last.ckpt: ModelCheckpoint with save_last, and the run's own"
            raise UserError(wrong, do="leave save_last out, or give ModelCheckpoint a dirpath")
    for name, (values, do) in ONLY.items():
        value = getattr(trainer, name)
        if value not in values:
            raise UserError(f"trainer.{name} does not work with rollouts", got=value, do=do)
