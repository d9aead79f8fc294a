"""The Trainer's precision: in what dtype weights are loaded, and what surrounds a forward."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from rlif_lightning.errors import UserError

# Lightning's other names for the same.
SHORT = {"bf16": "bf16-mixed", "16": "16-mixed", "32": "32-true", "64": "64-true", "None": "32-true"}
MIXED = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
TRUE = {"32-true": torch.float32, "64-true": torch.float64, "bf16-true": torch.bfloat16, "16-true": torch.float16}


def precision_name(precision: object, device: torch.device | None = None) -> str:
    """As Lightning's longer names have it; 16-mixed is bf16-mixed on a CPU.

    Args:
        precision: ``trainer.precision``.
        device: Where something is to be computed in it without a Trainer.

    Raises:
        UserError: Only a Trainer has it, as those of the transformer engine.
    """
    name = SHORT.get(str(precision), str(precision))
    if device is None:
        return name
    if name not in TRUE.keys() | MIXED.keys():
        raise UserError("The precision is not supported", got=name, expected=", ".join([*TRUE, *MIXED]))
    return "bf16-mixed" if name == "16-mixed" and device.type == "cpu" else name


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


@contextmanager
def autocast(precision: str, device: torch.device) -> Iterator[None]:
    """What Lightning's Trainer has around a forward.

    Args:
        precision: ``trainer.precision`` by its longer name.
        device: Of the weights.
    """
    if precision in MIXED:
        with torch.autocast(device.type, dtype=MIXED[precision], cache_enabled=False):
            yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(TRUE[precision])
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def convert(model: nn.Module, precision: str) -> None:
    """Bring weights and buffers into the dtype of a true precision other than 32-true, as the Trainer does."""
    if precision in TRUE and precision != "32-true":
        model.to(TRUE[precision])
