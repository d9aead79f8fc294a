"""What a recipe may say of the guard."""

from collections.abc import Sequence
from typing import Literal

from rlif_lightning.errors import UserError
from rlif_lightning.guard.rule import AGREEMENT, REFERENCE, SIMILARITY

Signal = Literal["agreement", "similarity", "start_logprob"]
SIGNALS: dict[Signal, str] = {"agreement": AGREEMENT, "similarity": SIMILARITY, "start_logprob": REFERENCE}
"""The metric of each signal."""


def check_settings(
    action: str,
    signals: Sequence[Signal] | None,
    *,
    drop: float,
    reference_drop: float,
    patience: int,
    smoothing: float,
    warmup: int,
) -> None:
    """Refuse what can't be; the settings are those of :class:`~rlif_lightning.callbacks.CollapseGuard`.

    Raises:
        UserError: The first that is out of range.
    """
    for name, value, right, expected in (
        ("action", action, action in ("off", "warn", "stop", "restore"), "off, warn, stop or restore"),
        ("signals", signals, signals is None or 0 < len(signals) == len({*signals}), "null, or each signal once"),
        ("drop", drop, 0 < drop < 1, "above 0 and below 1, such as 0.05 for 5 per cent"),
        ("reference_drop", reference_drop, reference_drop > 0, "above 0, such as 0.15 for 15 per cent"),
        ("patience", patience, patience >= 1, "1 or more"),
        ("smoothing", smoothing, 0 < smoothing <= 1, "above 0 and up to 1"),
        ("warmup", warmup, warmup >= 0, "0 or more"),
    ):
        if not right:
            raise UserError(f"guard.{name} is out of range", got=value, expected=expected)
    for signal in signals or ():
        if signal not in SIGNALS:
            raise UserError("guard.signals names an unknown signal", got=signal, expected=", ".join(SIGNALS))
