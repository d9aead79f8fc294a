"""Surrogates: what the policy-gradient loss takes of each token, before tokens are averaged.

All take log-probabilities and advantages that are 0 outside the mask, and have the same gradient on policy, where
every importance weight is 1. They differ in whose ratio is taken and in what a clip does to the gradient.
"""

from typing import NamedTuple

from torch import Tensor


class Surrogate(NamedTuple):
    """The surrogate of each token, to be minimised, and what its clip did."""

    loss: Tensor  # [N, T] with gradient
    ratio: Tensor  # [N, T] importance weight, before any clip
    clipped: Tensor  # [N, T] bool


def token_ratio(
    logprob: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, clip_low: float, clip_high: float
) -> Surrogate:
    """The clipped surrogate of PPO with each token's own ratio r_t = pi_t / pi_old_t (arXiv 1707.06347, eq. 7).

    -min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A): a token beyond its bound has no gradient.

    Args:
        logprob: [N, T] of the policy, with gradient, 0 outside the mask.
        old: [N, T] of the policy that sampled, 0 outside the mask.
        advantages: [N, T], 0 outside the mask.
        mask: [N, T] bool.
        clip_low: Lower bound of the ratio is 1 - clip_low.
        clip_high: Upper bound of the ratio is 1 + clip_high.
    """
    return _clip((logprob - old).exp(), advantages, clip_low, clip_high)


def sequence_ratio(
    logprob: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, clip_low: float, clip_high: float
) -> Surrogate:
    """GSPO (arXiv 2507.18071): all tokens of a sequence have its ratio s = exp(mean_t log(pi_t / pi_old_t)).

    A sequence is clipped as a whole. Written in the paper's token form, s_t = sg[s] pi_t / sg[pi_t], of the same
    value and gradient as s itself; but what leaves a token out of the sum leaves out that token's gradient,
    and not a share of the whole sequence's. Useful bounds are far narrower than a token's: the paper
    has clip_low 3e-4 and clip_high 4e-4.

    Args:
        logprob: [N, T] of the policy, with gradient, 0 outside the mask.
        old: [N, T] of the policy that sampled, 0 outside the mask.
        advantages: [N, T], 0 outside the mask.
        mask: [N, T] bool.
        clip_low: Lower bound of the ratio is 1 - clip_low.
        clip_high: Upper bound of the ratio is 1 + clip_high.
    """
    log_ratio = (logprob - old).detach().sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)  # [N, 1]
    return _clip((log_ratio + (logprob - logprob.detach())).exp(), advantages, clip_low, clip_high)


def capped_weight(
    logprob: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, clip_low: float, clip_high: float
) -> Surrogate:
    """CISPO (arXiv 2506.13585, eq. 4 and 5): -sg[min(r_t, 1 + clip_high)] A log pi_t.

    The importance weight is capped, the gradient is not cut: every token keeps one. There is no lower bound.
    The cap is 1 + clip_high as in the paper, so that one setting means one thing for every loss; a cap of 5
    (arXiv 2510.13786; TRL's epsilon_high, which is the cap itself) is a clip_high of 4. A token counts as clipped
    where the cap lowers its weight.

    Args:
        logprob: [N, T] of the policy, with gradient, 0 outside the mask.
        old: [N, T] of the policy that sampled, 0 outside the mask.
        advantages: [N, T], 0 outside the mask.
        mask: [N, T] bool.
        clip_low: Not used.
        clip_high: Upper bound of the weight is 1 + clip_high.
    """
    ratio = (logprob - old).detach().exp()
    loss = -ratio.clamp(max=1 + clip_high) * advantages * logprob
    return Surrogate(loss, ratio, (ratio > 1 + clip_high) & (advantages != 0))


def _clip(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Surrogate:
    loss = -(ratio * advantages).minimum(ratio.clamp(1 - low, 1 + high) * advantages)
    clipped = ((ratio < 1 - low) & (advantages < 0)) | ((ratio > 1 + high) & (advantages > 0))
    return Surrogate(loss, ratio, clipped)
