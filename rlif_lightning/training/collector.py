"""Collect one rollout: sample, read answers, score, reward, weigh. No Lightning here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rlif_lightning.data.prompts import Prompt
from rlif_lightning.errors import UserError
from rlif_lightning.functional.advantages import (
    Baseline,
    Scale,
    batch_std,
    combine_advantages,
    group_advantages,
)
from rlif_lightning.functional.token_stats import TokenStats
from rlif_lightning.grading import Grader, agreement
from rlif_lightning.models.scoring import CompletionScores
from rlif_lightning.rewards import Reward
from rlif_lightning.rollout import Rollout, completion_seeds
from rlif_lightning.sampling import Sampler, Sampling
from rlif_lightning.sampling.protocol import Progress


@dataclass(frozen=True)
class AdvantageSettings:
    """How rewards become advantages; see :func:`rlif_lightning.functional.advantages.group_advantages`."""

    scale: Scale = "group"
    baseline: Baseline = "mean"
    min_spread: float = 1e-4
    mask_truncated: bool = False
    agreement_band: tuple[float, float] | None = None


def sample_rollout(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    positions: list[tuple[int, ...]],
    seed: int,
    group_size: int,
    sampling: Sampling,
    decode: Callable[[list[list[int]]], list[str]],
    grader: Grader | None,
    progress: Progress | None = None,
    votes: int | None = None,
) -> Rollout:
    """Draw a group per prompt and read the answers out of the texts.

    Args:
        sampler: Up to date with the policy.
        prompts: P.
        positions: Of each prompt in the run, which seed its completions.
        seed: Of the run.
        group_size: G.
        sampling: The law to draw from.
        decode: Token ids to texts.
        grader: Reads answers, and compares them where a problem has a reference; null: neither.
        progress: Told how far the sampler is.
        votes: Completions per prompt whose answers count as votes, G or more; those beyond G are let go after
            that. null: G.
    """
    drawn = votes or group_size
    seeds = completion_seeds(seed, positions, drawn)
    samples = sampler.sample([p.ids for p in prompts], drawn, seeds, sampling, progress)
    texts = completion_texts(samples.completion_ids, samples.lengths, decode)
    ended = samples.ended.tolist()
    everyone = list(zip(texts, ended, strict=True))
    all_answers = grader.extract_answers(everyone) if grader is not None else []
    if drawn > group_size:
        keep = [i for i in range(len(texts)) if i % drawn < group_size]
        samples, seeds = samples.rows(torch.tensor(keep)), seeds[keep]
        texts, ended = [texts[i] for i in keep], [ended[i] for i in keep]
    rollout = Rollout(samples, group_size, sampling.temperature, seeds, texts)
    if grader is None:
        return rollout
    ballots = [grader.classes(all_answers[i : i + drawn]) for i in range(0, len(all_answers), drawn)]
    answers = [a for i, a in enumerate(all_answers) if i % drawn < group_size]
    golds = [p.problem.gold for p in prompts for _ in range(group_size)]
    correct = None
    if all(g is not None for g in golds):
        grades = grader.grade([(t, e, g) for t, e, g in zip(texts, ended, golds, strict=True) if g is not None])
        correct = torch.tensor(grades, dtype=torch.float32, device=samples.completion_ids.device)
    return replace(rollout, answers=answers, votes=ballots, correct=correct)


def completion_texts(ids: Tensor, lengths: Tensor, decode: Callable[[list[list[int]]], list[str]]) -> list[str]:
    """Completions as text, padding left out."""
    return decode([row[:n] for row, n in zip(ids.tolist(), lengths.tolist(), strict=True)])


def with_scores(
    rollout: Rollout,
    policy: nn.Module,
    sampling: Sampling,
    slices: Sequence[Tensor] | None = None,
    reference_forward: bool = False,
    head_weight_only: bool = True,
) -> Rollout:
    """Fill in what an engine without statistics left out, by one scoring pass of the policy.

    Args:
        rollout: As it was sampled.
        policy: That the engine sampled for.
        sampling: Which statistics, and their temperature.
        slices: As in :func:`score_slices`: those of the update, so that its first ratio is 1 to the last bit. null:
            all at once.
        reference_forward: As in :func:`score_slices`.
        head_weight_only: As in :func:`score_slices`.
    """
    samples = rollout.samples
    if samples.stats is not None:
        return rollout
    everything = [torch.arange(len(samples.completion_ids))]
    logprob, stats = score_slices(
        policy, rollout, slices or everything, sampling, True, reference_forward, head_weight_only
    )
    return replace(rollout, samples=replace(samples, logprob=logprob, stats=stats))


def with_importance(rollout: Rollout, cap: float | None) -> Rollout:
    """Weigh tokens that another engine drew from a law slightly unlike the policy's.

    w = min(policy / engine, cap), the truncated importance weight of Yao et al., "Your Efficient RL Framework
    Secretly Brings You Off-Policy RL Training" (2025).

    Args:
        rollout: With the log-probabilities of the policy.
        cap: Largest weight; null: no weights.
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
    reference_forward: bool = False,
    head_weight_only: bool = True,
) -> tuple[Tensor, TokenStats | None]:
    """Score the rollout under another model.

    The pass runs on the very slices that the update will use, so that at the first step policy and reference
    round alike and their divergence is exactly 0.

    Args:
        model: Whose distributions.
        rollout: Completions.
        slices: Row numbers that together are all rows.
        sampling: For the statistics' temperature, and which they are.
        statistics: Whether they are wanted.
        reference_forward: As the update's forward, see :class:`~rlif_lightning.models.scoring.CompletionScores`.
        head_weight_only: As the update's head.

    Returns:
        Log-probabilities [N, T] at the sampler's temperature, and the statistics [N, T] or None.
    """
    logprob = torch.zeros_like(rollout.samples.completion_ids, dtype=torch.float32)
    stats = TokenStats.zeros(logprob.shape, sampling.statistics, logprob.device) if statistics else None
    temperature = sampling.statistics_temperature or rollout.temperature
    for rows in slices:
        part = rollout.samples.rows(rows)
        scored = CompletionScores(model, part, reference_forward, head_weight_only)
        place = (rows.to(logprob.device), slice(part.completion_ids.shape[1]))
        logprob[place] = scored.logprobs(rollout.temperature)
        if stats is not None:
            found = scored.stats(temperature, sampling.statistics)
            for store, values in zip(stats.tensors, found.tensors, strict=True):
                store[place] = values
    return logprob, stats


def _checked(reward: Reward, value: object, rows: int) -> Tensor:
    """A reward's numbers as float32 [N].

    Raises:
        UserError: Something else, or nothing finite at all from a reward that does not abstain.
    """
    name = f"{type(reward).__module__}.{type(reward).__qualname__}"
    if not isinstance(value, Tensor) or value.shape != (rows,):
        got = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise UserError(
            f"The reward {name} must return one number per completion", got=got, expected=f"a tensor [{rows}]"
        )
    if not reward.abstains and not value.isfinite().any():
        raise UserError(f"The reward {name} gave no finite number for any completion, so nothing can be learned")
    return value.float()


class ScoredRollout(NamedTuple):
    """A rollout whose completions are rewarded and weighed, and which of its groups teach nothing."""

    rollout: Rollout  # with rewards, advantages [N] and loss mask [N, T]
    gated: Tensor  # [P] bool: the spread of every reward with a weight is too small
    filtered: Tensor | None  # [P] bool: agreement outside the band, where there is a band


def with_advantages(
    rollout: Rollout,
    rewards: Sequence[Reward],
    weights: Sequence[float],
    settings: AdvantageSettings,
    total: Callable[[Tensor], Tensor] = lambda x: x,
) -> ScoredRollout:
    """Reward the rollout and weigh its completions.

    Args:
        rollout: With all that the rewards ask for.
        rewards: Whose numbers are standardised in the group, weighted and summed.
        weights: Of each reward at this step; 0 computes it for the log only.
        settings: How.
        total: Sums a tensor over the processes.
    """
    samples, g = rollout.samples, rollout.group_size
    usable = samples.ended if settings.mask_truncated else torch.ones_like(samples.ended)  # [N]
    filtered = None
    if settings.agreement_band is not None:
        low, high = settings.agreement_band
        outside = [not low <= agreement(votes) <= high for votes in rollout.votes]
        filtered = torch.tensor(outside, device=usable.device)  # [P]
        usable = usable & ~filtered.repeat_interleave(g)
    values, parts, gates = {}, [], []
    for reward, weight in zip(rewards, weights, strict=True):
        # A reward of the user's own may have made its tensor on the CPU.
        value = _checked(reward, reward(rollout), len(samples.completion_ids)).to(usable.device)
        values[reward.name] = value
        # Out of the group's statistics and, below, of the loss: not a reward of 0.
        value = value.masked_fill(~usable, torch.nan)
        part, gated = group_advantages(
            value,
            g,
            scale=settings.scale,
            baseline=settings.baseline,
            batch_std=batch_std(value, total).to(value.dtype) if settings.scale == "batch" else None,
            min_spread=settings.min_spread,
        )
        parts.append(part)
        if weight:
            gates.append(gated)
    done = replace(
        rollout,
        rewards=values,
        advantages=combine_advantages(parts, weights),
        loss_mask=samples.completion_mask & usable[:, None],
    )
    nothing = torch.ones(len(usable) // g, dtype=torch.bool, device=usable.device)
    return ScoredRollout(done, torch.stack(gates).all(0) if gates else nothing, filtered)
