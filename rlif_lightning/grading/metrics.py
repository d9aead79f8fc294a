"""Figures over graded completions. Pure functions; numpy is imported where it is needed."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that at least one of k completions is right, drawn without replacement from n of which c are.

    The unbiased estimator `1 - C(n-c, k) / C(n, k)` of Chen et al. 2021 (arXiv 2107.03374), for one problem.

    Raises:
        ValueError: Not `0 <= c <= n` and `1 <= k <= n`.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def maj_at_k(answers: Sequence[str | None], correct: Sequence[bool], k: int) -> float:
    """Whether the most frequent answer of the first k completions of one problem is right: 1.0 or 0.0.

    Ties go to the answer that occurs first. A missing answer (None) never wins. The verdict is that of the winning
    answer's first occurrence. The first k completions are used, not an average over choices of k, so the
    figure depends on nothing but the order in which completions were sampled. The mean over problems is maj@k.

    Raises:
        ValueError: The lengths differ, or k is not from 1 to that length.
    """
    if not 1 <= k <= len(answers) == len(correct):
        raise ValueError(f"maj_at_k needs 1 <= k <= {len(answers)} answers = {len(correct)} verdicts, got k={k}")
    votes = Counter(answer for answer in answers[:k] if answer is not None)
    winners = votes.most_common(1)  # the first of equals: a Counter keeps the order of insertion
    return float(correct[list(answers).index(winners[0][0])]) if winners else 0.0


def agreement(answers: Sequence[Hashable | None]) -> float:
    """Largest share of a group that gives one and the same answer, from 0 to 1.

    The denominator is the size of the group, so missing answers (None) count against it and never as an answer.

    Raises:
        ValueError: The group is empty.
    """
    if not answers:
        raise ValueError("agreement needs at least one answer")
    votes = Counter(answer for answer in answers if answer is not None)
    return max(votes.values(), default=0) / len(answers)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Lower and upper end of the 95 % confidence interval of a mean over problems, of values from 0 to 1.

    Where every value is 0 or 1, Wilson's score interval of their share (Wilson 1927): it is right for few problems as
    well, and has a width where all are right or all wrong. Else the bootstrap.

    Raises:
        ValueError: No values.
    """
    if set(values) - {0.0, 1.0} or not len(values):
        return bootstrap_interval(values)
    n, share, z = len(values), sum(values) / len(values), 1.959963984540054
    centre, spread = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    low, high = ((centre + sign * spread) / (1 + z * z / n) for sign in (-1, 1))
    return low if share else 0.0, high if share < 1 else 1.0  # at these two ends exactly


def bootstrap_interval(values: Sequence[float], resamples: int = 10_000) -> tuple[float, float]:
    """Lower and upper end of the 95 % confidence interval of a mean over problems: the percentile bootstrap.

    Problems are drawn with replacement `resamples` times, in the same way for the same number of problems.

    Raises:
        ValueError: No values, or no resamples.
    """
    import numpy as np

    if not len(values) or resamples < 1:
        raise ValueError(f"bootstrap_interval needs values and resamples, got {len(values)} and {resamples}")
    data = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(0)
    rows = max(1, 1_000_000 // len(data))  # at most about 8 MB of indices at a time
    sizes = [(min(rows, resamples - done), len(data)) for done in range(0, resamples, rows)]
    means = np.concatenate([data[generator.integers(len(data), size=size)].mean(axis=1) for size in sizes])
    low, high = np.quantile(means, [(1 - 0.95) / 2, (1 + 0.95) / 2])
    return float(low), float(high)
