"""The Trainer's precision: in what dtype weights are loaded, and what surrounds a forward."""

from contextlib import AbstractContextManager

import torch
from lightning.pytorch.plugins import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from torch import nn

from rlif_lightning.errors import UserError

# Lightning's other names for the same.
SHORT = {"bf16": "bf16-mixed", "16": "16-mixed", "32": "32-true", "64": "64-true", "None": "32-true"}


def precision_name(precision: object, device_type: str = "cuda") -> str:
    """``trainer.precision`` by Lightning's longer names; on a CPU 16-mixed is bf16-mixed."""
    name = SHORT.get(str(precision), str(precision))
    return "bf16-mixed" if name == "16-mixed" and device_type == "cpu" else name


def frozen_dtype(precision: str) -> torch.dtype:
    """Dtype of weights that do not train."""
    return {"bf16": torch.bfloat16, "16": torch.float16}.get(precision.partition("-")[0], torch.float32)


def check_trains(precision: str) -> None:
    """Refuse a precision that rounds updates away."""
    if precision.endswith("-true") and precision not in ("32-true", "64-true"):
        wrong = "Training weights in half precision loses most updates to rounding"
        do = f"set --trainer.precision {precision.partition('-')[0]}-mixed"
        raise UserError(wrong, got=f"trainer.precision {precision}", do=do)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """What a Trainer of this precision has around a forward."""
    return _plugin(precision, device).forward_context()


def convert(model: nn.Module, precision: str, device: torch.device) -> None:
    """Bring weights and buffers into the dtype of a true precision, and onto the device, as a Trainer does."""
    _plugin(precision, device).convert_module(model).to(device)


def _plugin(precision: str, device: torch.device) -> Precision:
    if precision in ("bf16-mixed", "16-mixed"):
        return MixedPrecision(precision, device.type)  # type: ignore[arg-type]
    if precision in ("bf16-true", "16-true"):
        return HalfPrecision(precision)  # type: ignore[arg-type]
    if precision in ("32-true", "64-true"):
        return Precision() if precision == "32-true" else DoublePrecision()
    raise UserError("This precision needs a Trainer", got=f"trainer.precision {precision}")
