"""What a policy's own completions say about training it with internal rewards, before any training."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlif_lightning.diagnosis import association
from rlif_lightning.diagnosis.association import Array, Estimate, correlation_within, estimate, ratio, resample
from rlif_lightning.functional.similarity import group_similarity
from rlif_lightning.grading import agreement, maj_at_k, pass_at_k
from rlif_lightning.rewards import Reward
from rlif_lightning.rollout import Rollout
from rlif_lightning.training.rewarding import AdvantageSettings, with_advantages


@dataclass
class CompletionStats:
    """Numbers per completion [P, G] and per prompt [P] of one batch."""

    tokens: Array  # [P, G] completion tokens
    ended: Array  # [P, G] bool, closed by an end token
    sums: dict[str, Array]  # entropy, logprob, self_certainty: [P, G] sums over tokens, nats
    answered: Array  # [P, G] bool, an answer was found
    majority: Array  # [P, G] 1: gives the group's most frequent answer; nan where no answer comes twice
    agreement: Array  # [P] share of the group that gives the most frequent answer
    similarity: Array  # [P] of the texts of a group, 0 to 1
    correct: Array | None  # [P, G] 0 or 1, None without labels
    majority_correct: Array | None  # [P] whether the most frequent answer is right
    values: dict[str, Array] = field(default_factory=dict)  # reward -> [P, G]; nan: left out of training
    gated: dict[str, Array] = field(default_factory=dict)  # reward -> [P] bool, teaches nothing

    @property
    def targets(self) -> dict[str, Array]:
        """What rewards are held against, [P, G] each."""
        known = {} if self.correct is None else {"correct": self.correct}
        return {"agreement": self.majority, **known, "tokens": self.tokens}


def measure(
    rollouts: Sequence[Rollout], rewards: Sequence[Reward], settings: AdvantageSettings
) -> tuple[CompletionStats, list[Rollout], list[dict[str, Tensor]]]:
    """The numbers, the rollouts with loss masks, and each rollout's advantages [N] by reward.

    A run that starts here has the policy itself as its reference and as its running mean, so rewards by those
    annotators are the policy's own.
    """
    parts: list[CompletionStats] = []
    masked, advantages = [], []
    for rollout in rollouts:
        rollout = replace(rollout, annotations=dict.fromkeys(("reference", "ema"), rollout.statistics()))
        part, own = _completion_stats(rollout), dict[str, Tensor]()
        for reward in rewards:
            done, gated, _ = with_advantages(rollout, [reward], [1.0], settings)
            assert done.advantages is not None and done.loss_mask is not None
            value = done.rewards[reward.name].masked_fill(~done.loss_mask.any(1), torch.nan)
            part.values[reward.name] = _grid(value, rollout.group_size)
            part.gated[reward.name] = gated.cpu().numpy()
            own[reward.name] = done.advantages
        parts.append(part)
        masked.append(done)
        advantages.append(own)
    return _join(parts), masked, advantages


def _completion_stats(rollout: Rollout) -> CompletionStats:
    """All but the rewards."""
    samples, stats, g = rollout.samples, rollout.statistics(), rollout.group_size
    assert samples.logprob is not None
    mask = samples.completion_mask
    per_token = {"entropy": stats.entropy, "logprob": samples.logprob, "self_certainty": stats.self_certainty}
    votes = [own[:g] for own in rollout.votes] or [[None] * g] * (len(mask) // g)
    correct = majority_correct = None
    if rollout.correct is not None:
        correct = _grid(rollout.correct, g)
        words = [[None if v is None else str(v) for v in own] for own in votes]
        majority_correct = np.array([maj_at_k(w, list(c > 0), g) for w, c in zip(words, correct, strict=True)])
    return CompletionStats(
        tokens=_grid(samples.lengths, g),
        ended=_grid(samples.ended, g) > 0,
        sums={name: _grid(v.where(mask, 0).sum(1), g) for name, v in per_token.items()},
        answered=np.array([[v is not None for v in own] for own in votes]),
        majority=np.array([_in_majority(own) for own in votes]),
        agreement=np.array([agreement(own) for own in votes]),
        similarity=group_similarity(samples.completion_ids, mask, g).double().numpy(),
        correct=correct,
        majority_correct=majority_correct,
    )


def _in_majority(votes: Sequence[int | None]) -> list[float]:
    """Who gives the most frequent answer, the first of equals; nan where none comes twice."""
    found = Counter(v for v in votes if v is not None).most_common(1)
    most, count = found[0] if found else (None, 0)
    return [float(v == most) if count > 1 else np.nan for v in votes]


def _grid(values: Tensor, group_size: int) -> Array:
    return values.detach().double().cpu().numpy().reshape(-1, group_size)


def _join(parts: Sequence[CompletionStats]) -> CompletionStats:
    """The prompts of all parts below each other."""

    def join(values: Sequence[Any]) -> Any:
        if isinstance(values[0], dict):
            return {key: np.concatenate([v[key] for v in values]) for key in values[0]}
        return None if values[0] is None else np.concatenate(values)

    names = CompletionStats.__dataclass_fields__
    return CompletionStats(**{name: join([getattr(p, name) for p in parts]) for name in names})


def describe(m: CompletionStats) -> dict[str, Any]:
    """The policy: estimates with intervals over prompts, and the spread of self-certainty over completions."""
    prompts, g = m.tokens.shape
    counts, tokens = resample(prompts), m.tokens.sum(1)

    def mean(values: Array, sizes: Array | None = None) -> Estimate:
        return estimate(ratio(values, np.ones(prompts) if sizes is None else sizes), counts, prompts)

    certainty = (m.sums["self_certainty"] / m.tokens).flatten()
    found: dict[str, Any] = {
        **{name: mean(sums.sum(1), tokens) for name, sums in m.sums.items()},
        "self_certainty_of_completions": {
            "mean": float(certainty.mean()),
            "sd": float(certainty.std(ddof=1)),
            "quantiles": dict(zip(("5%", "25%", "50%", "75%", "95%"),
                                  np.quantile(certainty, [0.05, 0.25, 0.5, 0.75, 0.95]).tolist(), strict=True)),
        },
        "completion_tokens": mean(m.tokens.mean(1)),
        "truncated_fraction": mean(1 - m.ended.mean(1)),
        "answered_fraction": mean(m.answered.mean(1)),
        "agreement": mean(m.agreement),
        "similarity": mean(m.similarity),
    }  # fmt: skip
    if m.correct is not None and m.majority_correct is not None:
        found["accuracy"] = mean(m.correct.mean(1))
        right = m.correct.sum(1).astype(int)
        for k in sorted({2**p for p in range(g.bit_length()) if 2**p <= g} | {g}):
            found[f"pass@{k}"] = mean(np.array([pass_at_k(g, int(c), k) for c in right]))
        found[f"maj@{g}"] = mean(m.majority_correct)
        found["majority_gain"] = mean(m.majority_correct - m.correct.mean(1))
    return found


def compare(m: CompletionStats) -> dict[str, dict[str, Any]]:
    """Each reward against agreement, correctness and length.

    ``within``: after each group's mean was taken off, in groups that the reward can teach. ``overall``: over all
    completions, so differences between prompts count. ``auroc`` and ``auroc_within``: chance that of a right and a
    wrong (majority, minority) completion the right one has the higher reward.
    """
    counts = resample(len(m.tokens))
    found: dict[str, dict[str, Any]] = {}
    for name, value in m.values.items():
        usable = ~m.gated[name]
        found[name] = {
            "mean": _mean_of_known(value),
            "spread": _mean_of_known(spreads_of(value)),
            "gated_fraction": float(m.gated[name].mean()),
        }
        for target, y in m.targets.items():
            statistics = {"within": correlation_within(value, y, usable)}
            statistics["overall"] = association.correlation(value, y)
            if target != "tokens":
                statistics["auroc"] = association.auroc(value, y)
                statistics["auroc_within"] = association.auroc_within(value, y, usable)
            found[name][target] = {key: estimate(s, counts, groups) for key, (s, groups) in statistics.items()}
    return found


def length_correlations(m: CompletionStats) -> dict[str, Estimate]:
    """How the length of a completion goes with each target within groups: no reward should do worse."""
    found = {t: correlation_within(m.tokens, y) for t, y in m.targets.items() if t != "tokens"}
    return {t: estimate(statistic, resample(len(m.tokens)), groups) for t, (statistic, groups) in found.items()}


def spreads_of(values: Array) -> Array:
    """Standard deviation of each group of values [P, G] with two or more that are known, in the order of groups."""
    rows = [v[np.isfinite(v)] for v in values]
    return np.array([v.std(ddof=1) for v in rows if len(v) > 1])


def _mean_of_known(values: Array) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def difference(m: CompletionStats, one: str, other: str, target: str) -> Estimate:
    """How much closer one reward is to a target than another, within groups, on the same resamples of prompts."""
    (first, groups), (second, _) = (
        correlation_within(m.values[name], m.targets[target], ~m.gated[name]) for name in (one, other)
    )
    return estimate(lambda counts: first(counts) - second(counts), resample(len(m.tokens)), groups)


def value_correlations(m: CompletionStats) -> Tensor:
    """Correlations [K, K] of the rewards within groups, in groups that both can teach; nan where there are none."""

    def one(a: str, b: str) -> float:
        statistic, _ = correlation_within(m.values[a], m.values[b], ~m.gated[a] & ~m.gated[b])
        return association.at_once(statistic, len(m.tokens))

    return torch.tensor([[one(a, b) for b in m.values] for a in m.values], dtype=torch.float64)
