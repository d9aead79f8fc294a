"""The losses as tests call them: with tensors and settings by name, in place of records."""

from dataclasses import fields
from typing import Any

from torch import Tensor

from rlif_lightning.functional import fused_loss, losses
from rlif_lightning.functional.loss_records import LossInputs, LossSettings, PolicyLoss

INPUTS = {f.name for f in fields(LossInputs)}


def records(loss: Any = "grpo", **named: Any) -> tuple[LossInputs, LossSettings]:
    """Inputs and settings out of one bag."""
    inputs = {k: x for k, x in named.items() if k in INPUTS}
    return LossInputs(**inputs), LossSettings(loss, **{k: x for k, x in named.items() if k not in INPUTS})


def policy_loss(
    logprob: Tensor, advantages: Tensor, mask: Tensor, denominator: Any, *, entropy: Any = None, **named: Any
) -> PolicyLoss:
    inputs, settings = records(advantages=advantages, mask=mask, **named)
    return losses.policy_loss(logprob, inputs, denominator, settings, entropy)


def fused_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    completion_mask: Tensor,
    denominator: Any,
    temperature: float = 1.0,
    scale: float = 1.0,
    chunk: int | None = None,
    **named: Any,
) -> PolicyLoss:
    inputs, settings = records(**named)
    return fused_loss.fused_policy_loss(
        hidden, weight, ids, completion_mask, inputs, denominator, settings,
        temperature=temperature, scale=scale, chunk=chunk,
    )  # fmt: skip


def loss_denominator(mask: Tensor, loss: Any, max_tokens: int) -> Tensor:
    return losses.loss_denominator(mask, LossSettings(loss), max_tokens)
