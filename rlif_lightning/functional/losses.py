"""The one loss: a policy-gradient surrogate with an optional KL term and entropy bonus.

A window (one optimiser step) is cut into slices, over micro-batches and over ranks. The loss is a sum over
tokens that is divided by a denominator of the *whole window*, so the gradient does not depend on the cut.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rlif_lightning.functional.surrogates import Surrogate, capped_weight, sequence_ratio, token_ratio

Loss = Literal["grpo", "dapo", "bnpo", "dr_grpo", "gspo", "cispo"]
KLEstimator = Literal["k1", "k2", "k3"]

# What is averaged over: each sequence's token mean, then sequences; all tokens; a constant length per sequence.
Normalization = Literal["sequence", "token", "constant"]

# A loss is a surrogate and a normalisation: grpo (arXiv 2402.03300); dapo and bnpo (arXiv 2503.14476; two names of
# one thing once the denominator is the window's); dr_grpo (arXiv 2503.20783); gspo (arXiv 2507.18071); cispo
# (arXiv 2506.13585).
LOSSES: dict[str, tuple[Callable[..., Surrogate], Normalization]] = {
    "grpo": (token_ratio, "sequence"),
    "dapo": (token_ratio, "token"),
    "bnpo": (token_ratio, "token"),
    "dr_grpo": (token_ratio, "constant"),
    "gspo": (sequence_ratio, "sequence"),
    "cispo": (capped_weight, "token"),
}


class PolicyLoss(NamedTuple):
    """The loss of one slice, and what to log: sums over its tokens, so a window's mean is sum / sum."""

    loss: Tensor  # [] divided by the denominator, with gradient
    ratio: Tensor  # [] sum of pi / pi_old; for gspo each token counts its sequence's
    clipped: Tensor  # [] tokens whose gradient the clip cuts, or for cispo lowers
    kl: Tensor  # [] sum of the estimate of KL(pi || reference) in nats, 0 without a reference
    entropy: Tensor  # [] sum of the entropies in nats, 0 where none were given
    tokens: Tensor  # [] tokens in the mask


class TokenLoss(NamedTuple):
    """The loss of each token, and what to log; all 0 outside the mask."""

    loss: Tensor  # [...] l, with gradient, before weights
    ratio: Tensor  # [...] pi / pi_old; for gspo that of the token's sequence
    clipped: Tensor  # [...] bool
    kl: Tensor  # [...] estimate of KL(pi || reference) in nats, 0 without a reference
    entropy: Tensor  # [...] in nats, 0 where none was given


def loss_denominator(mask: Tensor, loss: Loss, max_tokens: int) -> Tensor:
    """What these rows add to the window's denominator D; the caller sums it over slices and ranks.

    Args:
        mask: [N, T] bool, the tokens that enter the loss.
        loss: grpo, gspo: rows with at least one token. dapo, bnpo, cispo: tokens. dr_grpo: all rows, empty ones
            too, times ``max_tokens``.
        max_tokens: Longest completion the sampler allows, whatever T is after trimming.

    Returns:
        [] fp32.

    Raises:
        ValueError: The loss is unknown.
    """
    _, normalization = _find(loss)
    if normalization == "sequence":
        return mask.any(1).sum().float()
    if normalization == "constant":
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
    entropy: Tensor | None = None,
    surrogate_mask: Tensor | None = None,
    importance: Tensor | None = None,
    loss: Loss = "grpo",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_coefficient: float = 0.0,
    kl_estimator: KLEstimator = "k3",
    entropy_coefficient: float = 0.0,
) -> PolicyLoss:
    """Surrogate with a KL penalty and an entropy bonus, to be minimised.

    With S the surrogate of a token (:mod:`rlif_lightning.functional.surrogates`), e.g. for grpo
    -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) with r = pi / pi_old of the token and A the advantage of its
    row, KL the estimate of :func:`kl_estimate` and H the entropy::

        l    = w S [surrogate_mask] + kl_coefficient KL - entropy_coefficient H
        loss = sum(c l) / D,    c = mask / tokens of the row for grpo and gspo, else mask

    A positive advantage raises the log-probability. So the bonus is the mean entropy with the loss's own token
    weights: sequences weigh equally for grpo and gspo, tokens for dapo, bnpo and cispo; for dr_grpo it is that
    of tokens times their share of N x max_tokens. Factors for accumulation and world size are the caller's.
    Masked positions may hold anything, nan and -inf included.

    Args:
        logprob: [N, T] of the policy, with gradient.
        advantages: [N].
        mask: [N, T] bool, the tokens that enter the loss; a row is never split between slices.
        denominator: D of the window, the sum of :func:`loss_denominator`. 0 (nothing to learn from): loss 0.
        old_logprob: [N, T] of the policy that sampled. None: on policy, the detached log-probabilities of
            this pass; the ratio is exactly 1 and the gradient that of REINFORCE.
        reference_logprob: [N, T] of the frozen reference.
        entropy: [N, T] of the policy, with gradient where it is rewarded.
        surrogate_mask: [N, T] bool, the tokens that learn from the advantage; None: all in the mask. KL, bonus
            and denominator stay with all.
        importance: [N, T] w, how much likelier a token was under the policy that is called old than under the engine
            that drew it, capped; None: 1. It corrects the surrogate alone (Yao et al. 2025).
        loss: Surrogate and weights of the tokens; must be that of the denominator.
        clip_low: The ratio is clipped below at 1 - clip_low; cispo has no lower bound.
        clip_high: And above at 1 + clip_high.
        kl_coefficient: 0 with a reference only reports the KL.
        kl_estimator: See :func:`kl_estimate`.
        entropy_coefficient: 0 with an entropy only reports it.

    Returns:
        The loss with gradient in ``logprob`` and ``entropy`` alone, and detached sums to log.

    Raises:
        ValueError: Shapes differ, a name is unknown, or a KL is asked for without a reference or a bonus without
            an entropy.
    """
    _find(loss)
    _check_shapes(
        logprob,
        advantages,
        mask=mask,
        old_logprob=old_logprob,
        reference_logprob=reference_logprob,
        entropy=entropy,
        surrogate_mask=surrogate_mask,
        importance=importance,
    )
    _check_given("a KL penalty", "kl_coefficient", kl_coefficient, "reference_logprob", reference_logprob)
    _check_given("an entropy bonus", "entropy_coefficient", entropy_coefficient, "entropy", entropy)
    token = token_loss(
        logprob,
        advantages[:, None].expand_as(mask),
        mask,
        old_logprob=old_logprob,
        reference_logprob=reference_logprob,
        entropy=entropy,
        surrogate_mask=surrogate_mask,
        importance=importance,
        loss=loss,
        clip_low=clip_low,
        clip_high=clip_high,
        kl_coefficient=kl_coefficient,
        kl_estimator=kl_estimator,
        entropy_coefficient=entropy_coefficient,
    )
    dtype = token.loss.dtype
    return PolicyLoss(
        loss=(token.loss * _weights(mask, loss, dtype)).sum() / _nonzero(denominator, mask.device),
        ratio=token.ratio.sum(),
        clipped=token.clipped.sum().to(dtype),
        kl=token.kl.sum(),
        entropy=token.entropy.sum(),
        tokens=mask.sum().to(dtype),
    )


def token_loss(
    logprob: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    old_logprob: Tensor | None = None,
    reference_logprob: Tensor | None = None,
    entropy: Tensor | None = None,
    surrogate_mask: Tensor | None = None,
    importance: Tensor | None = None,
    loss: Loss = "grpo",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_coefficient: float = 0.0,
    kl_estimator: KLEstimator = "k3",
    entropy_coefficient: float = 0.0,
) -> TokenLoss:
    """The loss l of each token, before weights; the formula is that of :func:`policy_loss`.

    A separable loss (:func:`is_separable`) takes tokens in any shape, so that a few of them can be done at a time;
    gspo needs whole rows.

    Args:
        logprob: [...] of the policy, with gradient; [N, T] for gspo, like all tensors that follow.
        advantages: [...] of each token's row.
        mask: [...] bool, the tokens that enter the loss; elsewhere anything may stand, nan and -inf included.
        old_logprob: [...] of the policy that sampled; None: on policy.
        reference_logprob: [...] of the frozen reference.
        entropy: [...] of the policy.
        surrogate_mask: [...] bool, the tokens that learn from the advantage; None: all in the mask.
        importance: [...] factor of the surrogate; None: 1.
        loss: Whose surrogate.
        clip_low: The ratio is clipped below at 1 - clip_low.
        clip_high: And above at 1 + clip_high.
        kl_coefficient: Weight of the KL estimate.
        kl_estimator: See :func:`kl_estimate`.
        entropy_coefficient: Weight of the entropy bonus.

    Raises:
        ValueError: A name is unknown.
    """
    surrogate, _ = _find(loss)
    dtype = torch.promote_types(logprob.dtype, torch.float32)

    def unpad(x: Tensor) -> Tensor:
        # Before any arithmetic: nan would survive a product with 0, in the value and in the gradient.
        return x.to(dtype).where(mask, 0)

    logprob = unpad(logprob)
    old = logprob.detach() if old_logprob is None else unpad(old_logprob.detach())
    value, ratio, clipped = surrogate(logprob, old, unpad(advantages.detach()), mask, clip_low, clip_high)
    if importance is not None:
        value = value * unpad(importance.detach())
    if surrogate_mask is not None:
        value, clipped = value.where(surrogate_mask, 0), clipped & surrogate_mask
    kl = bonus = torch.zeros_like(ratio)
    if reference_logprob is not None:
        kl = kl_estimate(logprob, unpad(reference_logprob.detach()), kl_estimator)
    if kl_coefficient:
        value = value + kl_coefficient * kl
    if entropy is not None:
        bonus = unpad(entropy)
    if entropy_coefficient:
        value = value - entropy_coefficient * bonus
    return TokenLoss(value, ratio.detach().where(mask, 0), clipped, kl.detach(), bonus.detach())


def token_weights(
    mask: Tensor, loss: Loss, denominator: Tensor | float, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The factor c / D of each token's loss in :func:`policy_loss`, whose loss is the sum of the products.

    Args:
        mask: [N, T] bool, the tokens that enter the loss, in whole rows.
        loss: Whose weights.
        denominator: D of the window.
        dtype: Of the answer.

    Returns:
        [N, T], 0 outside the mask.

    Raises:
        ValueError: The loss is unknown.
    """
    return _weights(mask, loss, dtype) / _nonzero(denominator, mask.device)


def is_separable(loss: Loss, entropy_coefficient: float = 0.0) -> bool:
    """Whether a token's part of the loss needs its own log-probability and no other quantity with gradient.

    So it is, but for gspo, whose ratio is a row's, and under an entropy bonus.

    Raises:
        ValueError: The loss is unknown.
    """
    surrogate, _ = _find(loss)
    return surrogate is not sequence_ratio and entropy_coefficient == 0


def kl_estimate(logprob: Tensor, reference: Tensor, estimator: KLEstimator = "k3") -> Tensor:
    """An estimate of KL(policy || reference) from tokens of the policy, per token, in nats.

    With d = reference - logprob (Schulman, "Approximating KL divergence", 2020)::

        k1 = -d                unbiased, of either sign
        k2 = d^2 / 2           biased, never negative
        k3 = exp(d) - d - 1    unbiased, never negative

    As a penalty it is the mean gradient that counts. On policy that of k2 is the gradient of this divergence; that
    of k3 is the gradient of KL(reference || policy), the same to first order near the reference; and that of k1
    is 0: it is noise that holds nothing back, and there to compare.

    Args:
        logprob: [...] of the policy.
        reference: [...] of the reference.
        estimator: k1, k2 or k3.

    Raises:
        ValueError: The estimator is unknown.
    """
    if estimator == "k3":
        return k3_divergence(logprob, reference)
    d = reference - logprob
    if estimator == "k2":
        return d.square() / 2
    if estimator == "k1":
        return -d
    raise ValueError(f"unknown KL estimator\n  got: {estimator!r}\n  expected: one of k1, k2, k3")


def k3_divergence(logprob: Tensor, reference: Tensor) -> Tensor:
    """The k3 estimate of KL(policy || reference) from tokens of the policy, per token, in nats.

    exp(d) - d - 1 with d = reference - logprob: 0 where they are equal, above 0 elsewhere.

    Args:
        logprob: [...] of the policy.
        reference: [...] of the reference.
    """
    d = reference - logprob
    return torch.expm1(d) - d  # exp(d) - 1 would lose a small d, and the estimate its sign


def _weights(mask: Tensor, loss: str, dtype: torch.dtype) -> Tensor:
    """Weight [N, T] of each token's loss; 0 outside the mask."""
    _, normalization = _find(loss)
    if normalization == "sequence":
        return mask.to(dtype) / mask.sum(1, keepdim=True).clamp(min=1)
    return mask.to(dtype)


def _nonzero(denominator: Tensor | float, device: torch.device) -> Tensor:
    """The denominator [], or 1 where it is 0: a window without a token has loss 0, not nan."""
    d = torch.as_tensor(denominator, device=device)
    return d.masked_fill(d == 0, 1)


def _find(loss: str) -> tuple[Callable[..., Surrogate], Normalization]:
    """Surrogate and normalisation of a name."""
    if loss not in LOSSES:
        raise ValueError(f"unknown loss\n  got: {loss!r}\n  expected: one of {', '.join(LOSSES)}")
    return LOSSES[loss]


def _check_given(what: str, setting: str, coefficient: float, name: str, needed: Tensor | None) -> None:
    """Refuse a coefficient of something that was not handed over."""
    if coefficient != 0 and needed is None:
        raise ValueError(
            f"{what} lacks its {name}\n"
            f"  got: {setting} {coefficient}, no {name}\n"
            f"  expected: {name} [N, T], or {setting} 0"
        )


def _check_shapes(logprob: Tensor, advantages: Tensor, **per_token: Tensor | None) -> None:
    """Refuse what broadcasting would accept in silence."""
    if logprob.ndim != 2:
        raise ValueError(f"logprob has a wrong shape\n  got: {list(logprob.shape)}\n  expected: [N, T]")
    wanted = {name: (x, logprob.shape) for name, x in per_token.items() if x is not None}
    for name, (x, shape) in {"advantages": (advantages, logprob.shape[:1]), **wanted}.items():
        if x.shape != shape:
            raise ValueError(f"{name} has a wrong shape\n  got: {list(x.shape)}\n  expected: {list(shape)}")
