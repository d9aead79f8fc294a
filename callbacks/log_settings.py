"""The settings that people change, in every logger."""

import json
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, Trainer

LOGGED = (
    "model.name", "rollout.rewards", "model.optimizer.lr", "model.kl_coefficient", "seed_everything",
    "model.loss", "model.lora", "rollout.prompts_per_step", "rollout.group_size", "rollout.temperature",
    "rollout.max_new_tokens", "guard.action", "trainer.max_steps",
)  # fmt: skip
"""The same for every run, because TensorBoard takes the columns of its table from one; it shows the first of them."""


class LogSettings(Callback):
    """Logs settings when training starts; all of them are in ``config.yaml``.

    Args:
        settings: All settings of the run, nested as in that file.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = {name: flat(settings, name) for name in LOGGED}

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Log them before any number: Trackio keeps those that it has with the first."""
        group = trainer.optimizers[0].param_groups[0]
        defaults = {  # settings may leave these two to the package
            "rollout.rewards": ", ".join(reward.name for reward in pl_module.collector.rewards),
            "model.optimizer.lr": group.get("initial_lr", group["lr"]),
        }
        for logger in trainer.loggers:
            logger.log_hyperparams(self.settings | defaults)


def flat(settings: Any, name: str) -> float | str:
    """The value of a setting such as ``model.name`` as a number or a text."""
    for part in name.split("."):
        settings = settings.get("init_args", settings) if isinstance(settings, dict) else {}
        settings = settings.get(part)
    return settings if isinstance(settings, int | float | str) else json.dumps(settings)
