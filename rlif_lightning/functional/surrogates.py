"""Surrogates: what the policy-gradient loss takes of each token, before tokens are averaged.

All have the same arguments: the log-probabilities of the policy [N, T] with gradient, those of the policy that
sampled [N, T], advantages [N, T], all 0 outside the mask [N, T] bool; and the bounds of the clip, low = 1 - clip_low
and high = 1 + clip_high. Those that look at each token alone take any shape. All have the same gradient on policy,
where every importance weight is 1. They differ in whose ratio is taken and in what a clip does to the gradient.
"""

from typing import NamedTuple

from torch import Tensor


class Surrogate(NamedTuple):
    """The surrogate of each token, to be minimised, and what its clip did."""

    loss: Tensor  # [N, T] with gradient
    ratio: Tensor  # [N, T] importance weight, before any clip
    clipped: Tensor  # [N, T] bool


def token_ratio(logprob: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, low: float, high: float) -> Surrogate:
    """The clipped surrogate of PPO with each token's own ratio r_t = pi_t / pi_old_t (arXiv 1707.06347, eq. 7).

    -min(r_t A, clip(r_t, low, high) A): a token beyond its bound has no gradient.
    """
    return _clip((logprob - old).exp(), advantages, low, high)


def sequence_ratio(
    logprob: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, low: float, high: float
) -> Surrogate:
    """GSPO (arXiv 2507.18071): all tokens of a sequence have its ratio s = exp(mean_t log(pi_t / pi_old_t)).

    A sequence is clipped as a whole. Written in the paper's token form, s_t = sg[s] pi_t / sg[pi_t], of the same
    value and gradient as s itself; but what leaves a token out of the sum leaves out that token's gradient,
    and not a share of the whole sequence's. Useful bounds are far narrower than a token's: the paper
    has clip_low 3e-4 and clip_high 4e-4.
    """
    log_ratio = (logprob - old).detach().sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)  # [N, 1]
    return _clip((log_ratio + (logprob - logprob.detach())).exp(), advantages, low, high)


def capped_weight(
    logprob: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, low: float, high: float
) -> Surrogate:
    """CISPO (arXiv 2506.13585, eq. 4 and 5): -sg[min(r_t, high)] A log pi_t.

    The importance weight is capped, the gradient is not cut: every token keeps one. There is no lower bound.
    The cap is 1 + clip_high as in the paper, so that one setting means one thing for every loss; a cap of 5
    (arXiv 2510.13786; TRL's epsilon_high, which is the cap itself) is a clip_high of 4. A token counts as clipped
    where the cap lowers its weight.
    """
    ratio = (logprob - old).detach().exp()
    loss = -ratio.clamp(max=high) * advantages * logprob
    return Surrogate(loss, ratio, (ratio > high) & (advantages != 0))


def _clip(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Surrogate:
    loss = -(ratio * advantages).minimum(ratio.clamp(low, high) * advantages)
    clipped = ((ratio < low) & (advantages < 0)) | ((ratio > high) & (advantages > 0))
    return Surrogate(loss, ratio, clipped)
