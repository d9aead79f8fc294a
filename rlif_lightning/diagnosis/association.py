"""How strongly two numbers per completion belong together, with bootstrap intervals over prompts.

Completions of one prompt are no independent evidence: intervals come from drawing whole prompts with replacement
(cluster bootstrap). So every statistic here is a function of how often each prompt was drawn: counts [R, P] to
values [R]; all counts 1 give the estimate itself. Of two numbers x, y [P, G] per completion, nan marks a completion
to leave out, and the number of prompts that say anything comes with the statistic.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Statistic = Callable[[Array], Array]  # counts [R, P] -> [R]; nan where it is not defined

RESAMPLES = 1000
GROUPS_LEAST = 8  # fewer prompts that say anything about a statistic give no interval


class Estimate(NamedTuple):
    """A number with its 95 % interval; nan where the data define none, or too few groups say anything."""

    value: float
    low: float
    high: float
    groups: int  # prompts that say anything about it

    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of 0."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        if np.isnan(self.value):
            return "-"
        certainty = f"({self.groups} groups)" if np.isnan(self.low) else f"[{self.low:.2f}, {self.high:.2f}]"
        return f"{self.value:.2f} {certainty}"


def resample(prompts: int, resamples: int = RESAMPLES, seed: int = 0) -> Array:
    """How often each prompt is drawn in each resample: counts [R, P], rows of sum P. Fixed by the seed."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples).astype(np.float64)


def estimate(statistic: Statistic, counts: Array, groups: int) -> Estimate:
    """A statistic of the data with its percentile interval."""
    low, high = interval(statistic(counts)) if groups >= GROUPS_LEAST else (float("nan"), float("nan"))
    return Estimate(at_once(statistic, counts.shape[1]), low, high, groups)


def at_once(statistic: Statistic, prompts: int) -> float:
    """The statistic of the data themselves: each prompt once."""
    return float(statistic(np.ones((1, prompts)))[0])


def interval(draws: Array) -> tuple[float, float]:
    """The middle 95 % of resampled values [R] that are defined (not of one class only); nan where most are not."""
    known = draws[np.isfinite(draws)]
    if len(known) * 2 < len(draws):
        return float("nan"), float("nan")
    low, high = np.quantile(known, [0.025, 0.975])
    return float(low), float(high)


def ratio(totals: Array, sizes: Array) -> Statistic:
    """Sum of totals [P] over sum of sizes [P]: a mean over tokens, completions or prompts."""
    return lambda counts: _divide(counts @ totals, counts @ sizes)


def correlation(x: Array, y: Array) -> tuple[Statistic, int]:
    """Pearson's correlation over all completions; for y of 0 and 1 the point-biserial correlation."""
    known = np.isfinite(x) & np.isfinite(y)
    # Counted from the mean, so that the sums of squares don't cancel.
    x, y = (np.where(known, v - v[known].mean() if known.any() else 0, 0) for v in (x, y))
    n, sx, sy, sxx, syy, sxy = (v.sum(1) for v in (known, x, y, x * x, y * y, x * y))  # each [P]

    def statistic(counts: Array) -> Array:
        m, mx, my = (counts @ v for v in (n, sx, sy))
        cov = m * (counts @ sxy) - mx * my
        vx, vy = m * (counts @ sxx) - mx**2, m * (counts @ syy) - my**2
        return _divide(cov, np.sqrt(np.maximum(vx, 0) * np.maximum(vy, 0)))

    return statistic, int(known.any(1).sum())


def correlation_within(x: Array, y: Array, use: Array | None = None) -> tuple[Statistic, int]:
    """Pearson's correlation after the mean of each group was taken off, as GRPO takes it off, in groups to use [P].

    Differences between prompts (easy prompts make confident completions) play no part in it. Groups in which x or y
    is constant, which teach nothing about their relation, are left out.
    """
    known = np.isfinite(x) & np.isfinite(y)
    vary = known.any(1) if use is None else known.any(1) & use
    for v in (x, y):
        vary = vary & (np.where(known, v, -np.inf).max(1) > np.where(known, v, np.inf).min(1))
    x, y = (centred(v, known) for v in (x, y))
    sums = [v.sum(1) * vary for v in (x * y, x * x, y * y)]  # each [P]

    def statistic(counts: Array) -> Array:
        sxy, sxx, syy = (counts @ v for v in sums)
        return _divide(sxy, np.sqrt(sxx * syy))

    return statistic, int(vary.sum())


def centred(values: Array, known: Array) -> Array:
    """Values [P, G] from the mean of their group's known ones; 0 where they are not known."""
    values = np.where(known, values, 0).astype(np.float64)
    means = values.sum(1, keepdims=True) / np.maximum(known.sum(1, keepdims=True), 1)
    return np.where(known, values - means, 0)


def auroc(scores: Array, labels: Array) -> tuple[Statistic, int]:
    """Chance that a completion labelled 1 scores above one labelled 0; a tie counts half (Mann-Whitney by ranks)."""
    known = np.isfinite(scores) & np.isfinite(labels)
    group = np.nonzero(known)[0]  # [N] of each completion
    order = np.argsort(scores[known], kind="stable")
    values, group, right = scores[known][order], group[order], labels[known][order] > 0.5
    starts = np.flatnonzero(np.r_[True, values[1:] != values[:-1]]) if len(values) else np.zeros(0, int)

    def statistic(counts: Array) -> Array:
        if not len(values):
            return np.full(len(counts), np.nan)
        weights = counts[:, group]  # [R, N]
        ones = np.add.reduceat(weights * right, starts, axis=1)  # [R, distinct scores]
        zeros = np.add.reduceat(weights * ~right, starts, axis=1)
        below = zeros.cumsum(1) - zeros
        return _divide((ones * (below + zeros / 2)).sum(1), ones.sum(1) * zeros.sum(1))

    return statistic, int(known.any(1).sum())


def auroc_within(scores: Array, labels: Array, use: Array | None = None) -> tuple[Statistic, int]:
    """The same over pairs of completions of one prompt only: whether the better one of a group is told apart."""
    known = np.isfinite(scores) & np.isfinite(labels)
    if use is not None:
        known = known & use[:, None]
    ones, zeros = known & (labels > 0.5), known & (labels <= 0.5)
    s = np.where(known, scores, 0)
    wins = (s[:, :, None] > s[:, None, :]) + 0.5 * (s[:, :, None] == s[:, None, :])  # [P, G, G]
    pairs = ones[:, :, None] & zeros[:, None, :]
    return ratio((wins * pairs).sum((1, 2)), pairs.sum((1, 2)).astype(float)), int(pairs.any((1, 2)).sum())


def _divide(a: Array, b: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(b > 0, a / b, np.nan)
