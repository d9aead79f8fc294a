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

    Ties go to the answer that occurs first. A missing answer never wins. The verdict is that of the winning
    answer's first occurrence. The first k completions are used, not an average over choices of k, so the
    figure depends on nothing but the order in which completions were sampled. The mean over problems is maj@k.

    Args:
        answers: Normalised answers, None where there is none.
        correct: Verdicts in the same order.
        k: How many completions vote.

    Raises:
        ValueError: The lengths differ, or k is not from 1 to that length.
    """
    if len(answers) != len(correct) or not 1 <= k <= len(answers):
        raise ValueError(
            f"maj_at_k needs as many answers as verdicts and 1 <= k <= n, "
            f"got {len(answers)} answers, {len(correct)} verdicts, k={k}"
        )
    votes = Counter(answer for answer in answers[:k] if answer is not None)
    if not votes:
        return 0.0
    winner = max(votes, key=votes.__getitem__)  # the first of equals: a Counter keeps the order of insertion
    return float(correct[list(answers).index(winner)])


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


def bootstrap_interval(
    values: Sequence[float], level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Lower and upper end of the confidence interval of a mean over problems: the percentile bootstrap.

    Problems are drawn with replacement `resamples` times; the interval holds the middle `level` of the means.
    The same arguments give the same interval.

    Raises:
        ValueError: No values, a level outside (0, 1), or no resamples.
    """
    import numpy as np

    if len(values) == 0 or not 0 < level < 1 or resamples < 1:
        raise ValueError(
            f"bootstrap_interval needs values, 0 < level < 1 and resamples >= 1, "
            f"got {len(values)} values, level={level}, resamples={resamples}"
        )
    data = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(seed)
    chunk = max(1, 1_000_000 // len(data))  # at most about 8 MB of indices at a time
    means = np.concatenate(
        [
            data[generator.integers(len(data), size=(min(chunk, resamples - done), len(data)))].mean(axis=1)
            for done in range(0, resamples, chunk)
        ]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
