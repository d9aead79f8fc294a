"""What the policy, or one of its references, says of sampled completions."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from rlif_lightning.functional.token_stats import TokenStats
from rlif_lightning.models.scoring import CompletionScores
from rlif_lightning.rollout import Rollout
from rlif_lightning.runs.signals import look_together
from rlif_lightning.sampling import Sampling


def with_scores(
    rollout: Rollout,
    policy: nn.Module,
    sampling: Sampling,
    slices: Sequence[Tensor] | None = None,
    head_weight_only: bool = True,
) -> Rollout:
    """Fill in what a sampler without statistics left out, by one scoring pass of the policy.

    The arguments are those of :func:`score_slices`: with the update's slices its first ratio is 1 to the last bit.
    """
    samples = rollout.samples
    if samples.stats is not None:
        return rollout
    everything = [torch.arange(len(samples.completion_ids))]
    logprob, stats = score_slices(policy, rollout, slices or everything, sampling, True, head_weight_only)
    return replace(rollout, samples=replace(samples, logprob=logprob, stats=stats))


def with_importance(rollout: Rollout, cap: float | None) -> Rollout:
    """Weigh tokens that another engine drew from a distribution slightly unlike the policy's.

    w = min(policy / engine, cap), the truncated importance weight of Yao et al., "Your Efficient RL Framework
    Secretly Brings You Off-Policy RL Training" (2025). A cap of None: no weights.
    """
    samples = rollout.samples
    if cap is None or samples.engine_logprob is None:
        return rollout
    assert samples.logprob is not None
    ratio = (samples.logprob - samples.engine_logprob).exp()
    return replace(rollout, importance=ratio.clamp(max=cap).where(samples.completion_mask, 1.0))


def score_slices(
    model: nn.Module,
    rollout: Rollout,
    slices: Sequence[Tensor],
    sampling: Sampling,
    statistics: bool,
    head_weight_only: bool = True,
) -> tuple[Tensor, TokenStats | None]:
    """Log-probabilities [N, T] in nats under another model, at the sampler's temperature, and statistics if wanted.

    The pass runs on the very slices (row numbers that together are all rows) and the head that the update will use,
    so that at the first step policy and reference round alike and their divergence is exactly 0.
    """
    logprob = torch.zeros_like(rollout.samples.completion_ids, dtype=torch.float32)
    stats = TokenStats.zeros(logprob.shape, sampling.statistics, logprob.device) if statistics else None
    temperature = sampling.statistics_temperature or rollout.temperature
    for rows in slices:
        look_together()
        part = rollout.samples.rows(rows)
        scored = CompletionScores(model, part, head_weight_only=head_weight_only)
        place = (rows.to(logprob.device), slice(part.completion_ids.shape[1]))
        logprob[place] = scored.logprobs(rollout.temperature)
        if stats is not None:
            found = scored.stats(temperature, sampling.statistics)
            for store, values in zip(stats.tensors, found.tensors, strict=True):
                store[place] = values
    return logprob, stats
