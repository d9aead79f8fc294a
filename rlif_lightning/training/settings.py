"""Settings of the RLIFModule: the optimiser where none is named, and which numbers are in range."""

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.optim import Optimizer

from rlif_lightning.errors import UserError

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]

RANGES: dict[str, tuple[Callable[[float], bool], str, str]] = {
    "ema_decay": (lambda x: 0 <= x < 1, "is out of range", "from 0 to below 1"),
    "reference_every": (lambda x: x >= 1, "is too small", "1 or more"),
    "top_entropy_fraction": (lambda x: 0 < x <= 1, "is out of range", "above 0, at most 1"),
    "warmup_ratio": (lambda x: 0 <= x < 1, "is out of range", "from 0 to below 1"),
}
OTHERS = (lambda x: x >= 0, "is negative", "0 or more")


def default_optimizer(parameters: Iterable[nn.Parameter]) -> Optimizer:
    """AdamW with the settings of arXiv 2505.19590."""
    return torch.optim.AdamW(parameters, lr=3e-6, betas=(0.9, 0.999), weight_decay=0.0)


def check_ranges(**settings: float) -> None:
    """Refuse numbers that are out of range.

    Raises:
        UserError: The first of them.
    """
    for setting, value in settings.items():
        fits, wrong, expected = RANGES.get(setting, OTHERS)
        if not fits(value):
            raise UserError(f"model.{setting} {wrong}", got=value, expected=expected)


def check_optimizer(optimizer: OptimizerFactory) -> None:
    """Refuse an optimiser that can't be made.

    Raises:
        UserError: It says why.
    """
    try:
        optimizer([nn.Parameter(torch.zeros(1))])
    except (TypeError, ValueError) as error:
        raise UserError("The optimizer refuses its settings", got=error, do="correct model.optimizer") from error
