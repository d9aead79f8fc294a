"""One way to log: now, at the step that the numbers belong to."""

import resource
import sys
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from rlif_lightning.errors import UserError


def log_now(trainer: Trainer, metrics: Mapping[str, float], step: int | None = None) -> None:
    """Send metrics to every logger at an optimiser step (null: the present one), and show them to callbacks.

    Not ``self.log``: under accumulation it passes on a window's last slice only, and it repeats the numbers
    of a rollout at each of its steps.
    """
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=trainer.global_step if step is None else step)
    trainer.callback_metrics.update({k: torch.tensor(v) for k, v in metrics.items()})


def collected_metrics(batch: Mapping[str, Any]) -> dict[str, float]:
    """What was logged of the rollout that was collected at this batch.

    Raises:
        UserError: No callback has collected one before the caller.
    """
    if "metrics" not in batch:
        raise UserError(
            "A callback that looks at rollouts stands before the one that collects them",
            do="list RolloutCallback before CollapseGuard and Completions",
        )
    metrics: dict[str, float] = batch["metrics"]
    return metrics


class Means:
    """Sums and counts that become means over all processes with one reduction."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.pairs: list[Tensor] = []

    def add(self, name: str, total: Tensor | float, count: Tensor | float) -> None:
        """Add one mean as its total and its count."""
        self.names.append(name)
        self.pairs.append(torch.stack([torch.as_tensor(x).double().cpu() for x in (total, count)]))

    def rows(self, name: str, values: Tensor) -> None:
        """Add the mean of a tensor's entries that are numbers."""
        numbers = values[~values.isnan()]
        self.add(name, numbers.sum(), numbers.numel())

    def reduce(self, trainer: Trainer) -> dict[str, float]:
        """The means over all processes; names in the order added, those with nothing counted left out."""
        if not self.names:
            return {}
        pairs = torch.stack(self.pairs)
        if trainer.world_size > 1:  # not on one process: not every device has float64
            pairs = torch.as_tensor(trainer.strategy.reduce(pairs.to(trainer.strategy.root_device), reduce_op="sum"))
        return {n: t / c for n, (t, c) in zip(self.names, pairs.tolist(), strict=True) if c}


def all_values(trainer: Trainer, values: Tensor) -> Tensor:
    """The values [n] of all processes, in their order, on every process; n may differ."""
    if trainer.world_size == 1:
        return values
    parts: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(parts, values.cpu())
    return torch.cat(parts).to(values.device)


def peak_memory_mb(module: LightningModule) -> float:
    """Peak memory of this process: of the GPU where there is one, else resident."""
    if module.device.type == "cuda":
        return torch.cuda.max_memory_allocated(module.device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, KiB elsewhere
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
