"""Collect one rollout: sample, read answers, score, reward, weigh. No Lightning here."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from rlif_lightning.errors import UserError
from rlif_lightning.functional.advantages import combine_advantages, group_advantages
from rlif_lightning.functional.token_stats import token_logprobs
from rlif_lightning.grading import Grader
from rlif_lightning.prompts import Prompt
from rlif_lightning.rewards import Reward
from rlif_lightning.rollout import Rollout, completion_seeds
from rlif_lightning.sampling import Sampler, Sampling
from rlif_lightning.sampling.protocol import Progress
from rlif_lightning.scoring import completion_logits, score


@dataclass(frozen=True)
class AdvantageSettings:
    """How rewards become advantages; see :func:`rlif_lightning.functional.advantages.group_advantages`."""

    scale: Literal["group", "none"] = "group"
    min_spread: float = 1e-4
    mask_truncated: bool = False


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


def with_scores(rollout: Rollout, policy: nn.Module, temperature: float | None) -> Rollout:
    """Fill in what an engine without statistics left out, by one scoring pass of the policy."""
    samples = rollout.samples
    if samples.stats is None:
        own = score(policy, samples, rollout.temperature)
        stats = own if temperature in (None, rollout.temperature) else score(policy, samples, temperature)
        samples = replace(samples, logprob=own.logprob, stats=stats)
    return replace(rollout, samples=samples)


def with_reference(
    rollout: Rollout, slices: Sequence[Tensor], reference: Callable[[], AbstractContextManager[nn.Module]]
) -> Rollout:
    """Log-probabilities [N, T] of the rollout under the frozen reference.

    The pass runs on the very slices that the update will use, so that at the first step policy and reference
    round alike and their divergence is exactly 0.
    """
    out = torch.zeros_like(rollout.samples.completion_ids, dtype=torch.float32)
    with reference() as model:
        for rows in slices:
            part = rollout.samples.rows(rows)
            width = part.completion_ids.shape[1]
            out[rows.to(out.device), :width] = token_logprobs(
                completion_logits(model, part), part.completion_ids, rollout.temperature
            )
    return replace(rollout, reference_logprob=out)


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


def with_advantages(
    rollout: Rollout, rewards: Sequence[Reward], weights: Sequence[float], settings: AdvantageSettings
) -> tuple[Rollout, Tensor]:
    """Reward the rollout and weigh its completions.

    Returns:
        The rollout with rewards, advantages [N] and loss mask [N, T]; and gated [P], the groups that teach
        nothing because every reward's spread is too small.
    """
    samples = rollout.samples
    mask = samples.completion_mask
    if settings.mask_truncated:
        mask = mask & samples.ended[:, None]
    values, parts, gates = {}, [], []
    for reward in rewards:
        value = _checked(reward, reward(rollout), len(samples.completion_ids))
        values[reward.name] = value
        if settings.mask_truncated:
            # Out of the group's statistics, not a reward of 0.
            value = value.masked_fill(~samples.ended, torch.nan)
        part, gated = group_advantages(
            value, rollout.group_size, scale=settings.scale, min_spread=settings.min_spread
        )
        parts.append(part)
        gates.append(gated)
    advantages = combine_advantages(parts, weights)
    done = replace(rollout, rewards=values, advantages=advantages, loss_mask=mask)
    return done, torch.stack(gates).all(0)
