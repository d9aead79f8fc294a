"""The Trainer's precision, as far as it decides in what dtype weights are loaded."""

import torch

from rlif_lightning.errors import UserError


def frozen_dtype(precision: str) -> torch.dtype:
    """Dtype of weights that do not train.

    Args:
        precision: ``trainer.precision``.
    """
    return torch.bfloat16 if precision.startswith("bf16") else torch.float32


def check_trains(precision: str) -> None:
    """Refuse a precision in which training would not do what it seems to.

    Args:
        precision: ``trainer.precision``.

    Raises:
        UserError: It rounds updates or gradients away.
    """
    if precision.endswith("-true") and precision not in ("32-true", "64-true"):
        raise UserError(
            "Training weights in half precision loses most updates to rounding",
            got=f"trainer.precision {precision}",
            do="set --trainer.precision bf16-mixed",
        )
    if precision == "16-mixed":
        raise UserError(
            "Training in float16 is not supported: gradients of single tokens are rounded to 0",
            got=f"trainer.precision {precision}",
            do="set --trainer.precision bf16-mixed, or 32-true on a device without bfloat16",
        )
