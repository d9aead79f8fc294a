"""One token from one row of logits: filters and inverse-CDF drawing."""

import math
from typing import Any

import torch
from torch import Tensor

from rlif_lightning.functional.token_stats import TokenStats
from rlif_lightning.sampling.protocol import Sampling

BLOCK = 512  # tokens per block of the two-level search


def filter_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """Set to -inf what top-k, top-p and min-p leave out, in this order, but never the most likely token.

    Logits [N, V] are already divided by the temperature.
    """
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if sampling.top_p < 1:
        values, order = logits.sort(descending=True)
        probability = values.softmax(-1)
        # A token stays while the tokens before it have not reached top_p yet.
        out = probability.cumsum(-1) - probability >= sampling.top_p
        logits = logits.masked_fill(torch.zeros_like(out).scatter(1, order, out), -torch.inf)
    if sampling.min_p > 0:
        probability = logits.softmax(-1)
        logits = logits.masked_fill(probability < sampling.min_p * probability.amax(-1, keepdim=True), -torch.inf)
    return logits


def _cumulative(weights: Tensor) -> Tensor:
    """Cumulative sums along the last dimension that rise only where a weight is positive.

    A parallel scan rounds each entry on a path of its own, so a plain one may rise at a weight of 0.
    """
    return weights.cumsum(-1).masked_fill(weights == 0, 0).cummax(-1).values


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """Index [N, 1] of the first entry above target; kept below the total, so it never lands on a zero weight."""
    below = torch.nextafter(cumulative[:, -1:], torch.zeros_like(target))
    return torch.searchsorted(cumulative, torch.minimum(target, below), right=True)


def inverse_cdf(
    weights: Tensor,  # [N, V] not negative, at least one positive per row
    uniforms: Tensor,  # [N] in [0, 1)
    sums: Tensor | None = None,  # [N, B] block_sums(weights), where they are known already
) -> Tensor:
    """Draw tokens [N] from unnormalised probabilities by their cumulative sum, never one of weight 0.

    In two levels: sums over blocks choose a block, a cumulative sum inside it chooses the token: one pass over the
    vocabulary, and no long chain of rounding.
    """
    v = weights.shape[1]
    width = min(BLOCK, v)
    sums = block_sums(weights) if sums is None else sums
    cumulative = _cumulative(sums)
    target = uniforms[:, None] * cumulative[:, -1:]
    block = _first_above(cumulative, target)  # [N, 1]
    tokens = block * width + torch.arange(width, device=weights.device)  # [N, W] of the block
    inside = _cumulative(weights.gather(1, tokens.clamp(max=v - 1)).masked_fill(tokens >= v, 0))
    # Rounding may leave the rest a hair below 0: it must not fall on a leading weight of 0.
    rest = (target - (cumulative - sums).gather(1, block)).clamp(min=0)
    return (block * width + _first_above(inside, rest)).squeeze(1)


def block_sums(weights: Tensor) -> Tensor:
    """Sums [N, B] of blocks of the vocabulary [N, V]; the last block may be shorter."""
    width = min(BLOCK, weights.shape[1])
    end = weights.shape[1] // width * width  # of the last full block
    sums = weights[:, :end].unflatten(1, (-1, width)).sum(-1)
    return sums if end == weights.shape[1] else torch.cat([sums, weights[:, end:].sum(-1, keepdim=True)], 1)


class TokenSampler:
    """Draws a token of each row and takes its statistics from the same exponentials.

    The quantities of :func:`~rlif_lightning.functional.token_stats.token_stats`, with fewer passes over the
    vocabulary; measured against it in the tests. One buffer serves all tokens: fresh memory of this size costs a CPU
    more than the exponentials that are written to it.
    """

    def __init__(self) -> None:
        self._weights = torch.empty(0, 0)

    def __call__(self, logits: Tensor, u: Tensor | None) -> tuple[Tensor, TokenStats]:
        """Tokens [N] of softmax(logits) and their statistics [N] in nats.

        Logits [N, V] are fp32, finite, already divided by the temperature; they are overwritten. ``u`` [N] are
        uniform numbers in [0, 1); None takes the most likely token.
        """
        n, v = logits.shape
        if self._weights.shape[1] != v or len(self._weights) < n or self._weights.device != logits.device:
            self._weights = torch.empty_like(logits)
        # Shifted by the largest: no overflow, and no cancellation where logits are large.
        z = logits.sub_(logits.amax(-1, keepdim=True))
        weights = torch.exp(z, out=self._weights[:n])
        sums = block_sums(weights)
        token = z.argmax(-1) if u is None else inverse_cdf(weights, u, sums)
        total = sums.sum(-1)
        log_total = total.log()
        return token, TokenStats(
            logprob=z.gather(1, token[:, None]).squeeze(1) - log_total,
            entropy=log_total - torch.bmm(weights[:, None], z[:, :, None]).view(n) / total,
            self_certainty=log_total - z.mean(-1) - math.log(v),
        )


def uniforms(seeds: Tensor, count: int) -> Tensor:
    """[N, count] uniform numbers in [0, 1); a row depends on its own seed only."""
    # Of one device and dtype, whatever the defaults around us: the same numbers everywhere.
    kind: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    return torch.stack([torch.rand(count, generator=torch.Generator().manual_seed(int(s)), **kind) for s in seeds])
