"""The one loss: a policy-gradient surrogate with an optional KL term and entropy bonus.

A window (one optimiser step) is cut into slices, over micro-batches and over ranks. The loss is a sum over
tokens that is divided by a denominator of the *whole window*, so the gradient does not depend on the cut.
"""

import torch
from torch import Tensor

from rlif_lightning.functional.loss_records import KLEstimator, LossInputs, LossSettings, PolicyLoss


def loss_denominator(mask: Tensor, settings: LossSettings, max_tokens: int) -> Tensor:
    """What these rows add to the window's denominator D, [] fp32; the caller sums it over slices and ranks.

    With the mask [N, T] bool of the tokens that enter the loss. grpo, gspo: rows with at least one token. dapo, bnpo,
    cispo: tokens. dr_grpo: all rows, empty ones too, times ``max_tokens``, the longest completion that the sampler
    allows, whatever T is after trimming.
    """
    if settings.normalization == "sequence":
        return mask.any(1).sum().float()
    if settings.normalization == "constant":
        return torch.tensor(float(len(mask) * max_tokens), device=mask.device)
    return mask.sum().float()


def policy_loss(
    logprob: Tensor,  # [N, T] of the policy, with gradient; may hold anything outside the mask
    inputs: LossInputs,
    denominator: Tensor | float,  # D of the window, the sum of loss_denominator; 0 (nothing to learn from): loss 0
    settings: LossSettings,  # those of the denominator
    entropy: Tensor | None = None,  # [N, T] of the policy in nats, with gradient where it is rewarded
) -> PolicyLoss:
    """Surrogate with a KL penalty and an entropy bonus, to be minimised.

    With S the surrogate of a token (:mod:`rlif_lightning.functional.surrogates`), e.g. for grpo
    -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) with r = pi / pi_old of the token and A the advantage of its
    row, KL the estimate of :func:`kl_estimate` and H the entropy::

        l    = w S [surrogate_mask] + kl_coefficient KL - entropy_coefficient H
        loss = sum(c l) / D,    c = mask / tokens of the row for grpo and gspo, else mask

    A positive advantage raises the log-probability. The bonus is the mean entropy with the loss's own token
    weights: sequences weigh equally for grpo and gspo, tokens for dapo, bnpo and cispo; for dr_grpo it is that
    of tokens times their share of N x max_tokens. Factors for accumulation and world size are the caller's.

    Returns:
        The loss with gradient in ``logprob`` and ``entropy`` alone, and detached sums to log.

    Raises:
        ValueError: Shapes differ, or a KL is asked for without a reference or a bonus without an entropy.
    """
    inputs.check_shapes(logprob, entropy=entropy)
    _check_given("reference_logprob", inputs.reference_logprob, "kl_coefficient", settings)
    _check_given("entropy", entropy, "entropy_coefficient", settings)
    mask, token = inputs.mask, token_loss(logprob, inputs.by_token(), settings, entropy)
    dtype = token.loss.dtype
    loss = (token.loss * token_weights(mask, settings, dtype)).sum() / nonzero(denominator, mask.device)
    return PolicyLoss(loss, *(x.sum().to(dtype) for x in token[1:]))


def token_loss(
    logprob: Tensor, inputs: LossInputs, settings: LossSettings, entropy: Tensor | None = None
) -> PolicyLoss:
    """The loss l of each token, before weights; the formula is that of :func:`policy_loss`.

    Log-probability, inputs (advantages as well, see :meth:`LossInputs.by_token`) and entropy have one shape, any
    one for a separable loss, so that a few tokens can be done at a time; gspo needs whole rows [N, T].
    """
    mask, dtype = inputs.mask, torch.promote_types(logprob.dtype, torch.float32)

    def unpad(x: Tensor) -> Tensor:
        # Before any arithmetic: nan would survive a product with 0, in the value and in the gradient.
        return x.to(dtype).where(mask, 0)

    logprob = unpad(logprob)
    old = logprob.detach() if inputs.old_logprob is None else unpad(inputs.old_logprob.detach())
    advantages, low, high = unpad(inputs.advantages.detach()), 1 - settings.clip_low, 1 + settings.clip_high
    value, ratio, clipped = settings.surrogate(logprob, old, advantages, mask, low, high)
    if inputs.importance is not None:
        value = value * unpad(inputs.importance.detach())
    if inputs.surrogate_mask is not None:
        value, clipped = value.where(inputs.surrogate_mask, 0), clipped & inputs.surrogate_mask
    kl = bonus = torch.zeros_like(ratio)
    if inputs.reference_logprob is not None:
        kl = kl_estimate(logprob, unpad(inputs.reference_logprob.detach()), settings.kl_estimator)
    if settings.kl_coefficient:
        value = value + settings.kl_coefficient * kl
    if entropy is not None:
        bonus = unpad(entropy)
    if settings.entropy_coefficient:
        value = value - settings.entropy_coefficient * bonus
    return PolicyLoss(value, ratio.detach().where(mask, 0), clipped, kl.detach(), bonus.detach(), mask)


def kl_estimate(logprob: Tensor, reference: Tensor, estimator: KLEstimator = "k3") -> Tensor:
    """An estimate of KL(policy || reference) from tokens of the policy, per token [...], in nats.

    With d = reference - logprob (Schulman, "Approximating KL divergence", 2020)::

        k2 = d^2 / 2           biased, never negative
        k3 = exp(d) - d - 1    unbiased, never negative

    As a penalty it is the mean gradient that counts. On policy that of k2 is the gradient of this divergence; that
    of k3 is the gradient of KL(reference || policy), the same to first order near the reference. (The mean gradient
    of Schulman's k1 = -d is 0: it holds nothing back.)
    """
    d = reference - logprob
    if estimator == "k2":
        return d.square() / 2
    return torch.expm1(d) - d  # exp(d) - 1 would lose a small d, and the estimate its sign


def token_weights(mask: Tensor, settings: LossSettings, dtype: torch.dtype) -> Tensor:
    """The weight c [N, T] of each token's loss in :func:`policy_loss`, from the mask [N, T]; 0 outside it."""
    if settings.normalization == "sequence":
        return mask.to(dtype) / mask.sum(1, keepdim=True).clamp(min=1)
    return mask.to(dtype)


def nonzero(denominator: Tensor | float, device: torch.device) -> Tensor:
    """The denominator [], or 1 where it is 0: a window without a token has loss 0, not nan."""
    d = torch.as_tensor(denominator, device=device)
    return d.masked_fill(d == 0, 1)


def _check_given(name: str, given: Tensor | None, setting: str, settings: LossSettings) -> None:
    """Refuse a coefficient of something that was not handed over."""
    coefficient = getattr(settings, setting)
    if coefficient and given is None:
        got = f"{setting} {coefficient}, no {name}"
        raise ValueError(f"the loss lacks {name}\n  got: {got}\n  expected: {name} [N, T], or {setting} 0")
