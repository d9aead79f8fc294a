"""The one loss: a clipped policy-gradient surrogate with an optional KL term.

A window (one optimiser step) is cut into slices, over micro-batches and over ranks. The loss is a sum over
tokens that is divided by a denominator of the *whole window*, so the gradient does not depend on the cut.
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

# What is averaged over: grpo, each sequence's token mean, then sequences (arXiv 2402.03300); dapo and bnpo,
# all tokens of the window (arXiv 2503.14476; two names of one thing once the denominator is the window's);
# dr_grpo, a constant length for each sequence (arXiv 2503.20783).
Normalization = Literal["grpo", "dapo", "bnpo", "dr_grpo"]


class PolicyLoss(NamedTuple):
    """The loss of one slice, and what to log: sums over its tokens, so a window's mean is sum / sum."""

    loss: Tensor  # [] divided by the denominator, with gradient
    ratio: Tensor  # [] sum of pi / pi_old
    clipped: Tensor  # [] tokens whose gradient the clip cuts
    kl: Tensor  # [] sum of the k3 estimate of KL(pi || reference) in nats, 0 without a reference
    tokens: Tensor  # [] tokens in the mask


def loss_denominator(mask: Tensor, normalization: Normalization, max_tokens: int) -> Tensor:
    """What these rows add to the window's denominator D; the caller sums it over slices and ranks.

    Args:
        mask: [N, T] bool, the tokens that enter the loss.
        normalization: grpo: rows with at least one token. dapo, bnpo: tokens. dr_grpo: all rows, empty ones
            too, times ``max_tokens``.
        max_tokens: Longest completion the sampler allows, whatever T is after trimming.

    Returns:
        [] fp32.

    Raises:
        ValueError: The normalization is unknown.
    """
    _check_normalization(normalization)
    if normalization == "grpo":
        return mask.any(1).sum().float()
    if normalization == "dr_grpo":
        return torch.tensor(float(len(mask) * max_tokens), device=mask.device)
    return mask.sum().float()


def policy_loss(
    logprob: Tensor,
    advantages: Tensor,
    mask: Tensor,
    denominator: Tensor | float,
    *,
    old_logprob: Tensor | None = None,
    reference_logprob: Tensor | None = None,
    normalization: Normalization = "grpo",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_coefficient: float = 0.0,
) -> PolicyLoss:
    """Clipped surrogate with a KL penalty, to be minimised.

    With r = pi / pi_old of a token, A the advantage of its row and d = log pi_ref - log pi::

        l    = -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl_coefficient (exp(d) - d - 1)
        loss = sum(w l) / D,    w = mask / tokens of the row for grpo, else mask

    A positive advantage raises the log-probability. The KL term is the k3 estimator: never negative,
    unbiased on policy. Factors for accumulation and world size are the caller's. Masked positions may hold
    anything, nan and -inf included.

    Args:
        logprob: [N, T] of the policy, with gradient.
        advantages: [N].
        mask: [N, T] bool, the tokens that enter the loss; a row is never split between slices.
        denominator: D of the window, the sum of :func:`loss_denominator`. 0 (nothing to learn from): loss 0.
        old_logprob: [N, T] of the policy that sampled. None: on policy, the detached log-probabilities of
            this pass; the ratio is exactly 1 and the gradient that of REINFORCE.
        reference_logprob: [N, T] of the frozen reference.
        normalization: The weights of the tokens; must be that of the denominator.
        clip_low: The ratio is clipped below at 1 - clip_low.
        clip_high: And above at 1 + clip_high.
        kl_coefficient: 0 with a reference only reports the KL.

    Returns:
        The loss with gradient in ``logprob`` alone, and detached sums to log.

    Raises:
        ValueError: Shapes differ, the normalization is unknown, or a KL is asked for without a reference.
    """
    _check_normalization(normalization)
    _check_shapes(logprob, advantages, mask, old_logprob, reference_logprob)
    if kl_coefficient != 0 and reference_logprob is None:
        raise ValueError(
            "a KL penalty needs a reference\n"
            f"  got: kl_coefficient {kl_coefficient}, no reference_logprob\n"
            "  expected: reference_logprob [N, T], or kl_coefficient 0"
        )
    dtype = torch.promote_types(logprob.dtype, torch.float32)

    def unpad(x: Tensor) -> Tensor:
        # Before any arithmetic: nan would survive a product with 0, in the value and in the gradient.
        return x.to(dtype).where(mask, 0)

    logprob = unpad(logprob)  # [N, T]
    old = logprob.detach() if old_logprob is None else unpad(old_logprob.detach())
    ratio = (logprob - old).exp()  # [N, T]
    a = unpad(advantages.detach()[:, None].expand_as(mask))  # [N, T]
    token_loss = -torch.minimum(ratio * a, ratio.clamp(1 - clip_low, 1 + clip_high) * a)  # [N, T]
    kl = torch.zeros_like(ratio)
    if reference_logprob is not None:
        kl = k3_divergence(logprob, unpad(reference_logprob.detach()))  # [N, T]
    if kl_coefficient:
        token_loss = token_loss + kl_coefficient * kl
    clipped = ((ratio < 1 - clip_low) & (a < 0)) | ((ratio > 1 + clip_high) & (a > 0))  # [N, T]
    return PolicyLoss(
        loss=(token_loss * _weights(mask, normalization, dtype)).sum() / _nonzero(denominator, mask.device),
        ratio=ratio.detach().where(mask, 0).sum(),
        clipped=clipped.sum().to(dtype),
        kl=kl.detach().sum(),
        tokens=mask.sum().to(dtype),
    )


def k3_divergence(logprob: Tensor, reference: Tensor) -> Tensor:
    """The k3 estimate of KL(policy || reference) from tokens of the policy, per token, in nats.

    exp(d) - d - 1 with d = reference - logprob: 0 where they are equal, above 0 elsewhere.

    Args:
        logprob: [...] of the policy.
        reference: [...] of the reference.
    """
    d = reference - logprob
    return torch.expm1(d) - d  # exp(d) - 1 would lose a small d, and the estimate its sign


def _weights(mask: Tensor, normalization: Normalization, dtype: torch.dtype) -> Tensor:
    """Weight [N, T] of each token's loss; 0 outside the mask."""
    if normalization == "grpo":
        return mask.to(dtype) / mask.sum(1, keepdim=True).clamp(min=1)
    return mask.to(dtype)


def _nonzero(denominator: Tensor | float, device: torch.device) -> Tensor:
    """The denominator [], or 1 where it is 0: a window without a token has loss 0, not nan."""
    d = torch.as_tensor(denominator, device=device)
    return d.masked_fill(d == 0, 1)


def _check_normalization(normalization: str) -> None:
    if normalization not in get_args(Normalization):
        raise ValueError(
            f"unknown normalization\n  got: {normalization!r}\n  expected: one of {get_args(Normalization)}"
        )


def _check_shapes(
    logprob: Tensor, advantages: Tensor, mask: Tensor, old: Tensor | None, reference: Tensor | None
) -> None:
    """Refuse what broadcasting would accept in silence."""
    if logprob.ndim != 2:
        raise ValueError(f"logprob has a wrong shape\n  got: {list(logprob.shape)}\n  expected: [N, T]")
    per_token = {"mask": mask, "old_logprob": old, "reference_logprob": reference}
    wanted = {name: (x, logprob.shape) for name, x in per_token.items() if x is not None}
    for name, (x, shape) in {"advantages": (advantages, logprob.shape[:1]), **wanted}.items():
        if x.shape != shape:
            raise ValueError(f"{name} has a wrong shape\n  got: {list(x.shape)}\n  expected: {list(shape)}")
