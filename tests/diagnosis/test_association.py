"""Correlations, AUROC and cluster bootstrap against naive loops and hand-worked cases."""

import itertools
import math

import numpy as np
import pytest

from rlif_lightning.diagnosis.association import (
    GROUPS_LEAST,
    auroc,
    auroc_within,
    correlation,
    correlation_within,
    estimate,
    interval,
    ratio,
    resample,
)

NAN = float("nan")


def once(statistic, prompts):
    return float(statistic(np.ones((1, prompts)))[0])


def random_case(seed, prompts=12, group=5, missing=True):
    """Rounded, so that there are ties; a difficulty of the prompt in both."""
    generator = np.random.default_rng(seed)
    level = generator.normal(size=(prompts, 1))
    x = (level + generator.normal(size=(prompts, group))).round(1)
    y = (generator.random((prompts, group)) < 1 / (1 + np.exp(-level - 0.5 * x))).astype(float)
    if missing:
        x[generator.random(x.shape) < 0.1] = NAN
        y[generator.random(y.shape) < 0.1] = NAN
    return x, y


def drawn(x, counts):
    """The rows of a resample, one below the other."""
    return np.concatenate([x[p][None] for p, n in enumerate(counts) for _ in range(int(n))])


def pairs_of(x, y):
    return [(a, b) for a, b in zip(x.flatten(), y.flatten(), strict=True) if not math.isnan(a) and not math.isnan(b)]


def naive_auroc(pairs):
    ones, zeros = [a for a, b in pairs if b == 1], [a for a, b in pairs if b == 0]
    wins = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in itertools.product(ones, zeros))
    return wins / (len(ones) * len(zeros)) if ones and zeros else NAN


def naive_within(x, y):
    sxy = sxx = syy = 0.0
    for a, b in zip(x, y, strict=True):
        pairs = pairs_of(a, b)
        if len({p[0] for p in pairs}) < 2 or len({p[1] for p in pairs}) < 2:
            continue
        ma, mb = (sum(p[i] for p in pairs) / len(pairs) for i in (0, 1))
        sxy += sum((p - ma) * (q - mb) for p, q in pairs)
        sxx += sum((p - ma) ** 2 for p, _ in pairs)
        syy += sum((q - mb) ** 2 for _, q in pairs)
    return sxy / math.sqrt(sxx * syy) if sxx * syy else NAN


@pytest.mark.parametrize("seed", range(6))
def test_statistics_of_resamples_are_those_of_the_rows_that_were_drawn(seed):
    x, y = random_case(seed)
    counts = resample(len(x), 8, seed)
    within, groups = correlation_within(x, y)
    assert 0 < groups <= len(x)
    both, _ = auroc_within(x, y)
    got = [f(counts) for f in (correlation(x, y)[0], within, auroc(x, y)[0], both)]
    for r, own in enumerate(counts):
        a, b = drawn(x, own), drawn(y, own)
        pairs = pairs_of(a, b)
        inside = [naive_pairs(i, j) for i, j in zip(a, b, strict=True)]
        expected = [
            np.corrcoef(*zip(*pairs, strict=True))[0, 1],
            naive_within(a, b),
            naive_auroc(pairs),
            sum(w for w, _ in inside) / sum(n for _, n in inside),
        ]
        np.testing.assert_allclose([g[r] for g in got], expected, rtol=1e-9)


def naive_pairs(x, y):
    """Wins of the right ones and pairs within one group."""
    pairs = pairs_of(x, y)
    right, wrong = [a for a, b in pairs if b == 1], [a for a, b in pairs if b == 0]
    wins = sum((a > b) + 0.5 * (a == b) for a in right for b in wrong)
    return wins, len(right) * len(wrong)


def test_auroc_with_ties_by_hand():
    # right: 3, 1; wrong: 1, 0: the pairs (3,1) (3,0) (1,0) are won, (1,1) is a tie: 3.5 of 4
    scores, labels = np.array([[3.0, 1.0], [1.0, 0.0]]), np.array([[1.0, 1.0], [0.0, 0.0]])
    assert once(auroc(scores, labels)[0], 2) == 0.875
    assert once(auroc(-scores, labels)[0], 2) == 0.125
    assert once(auroc(np.zeros((2, 2)), labels)[0], 2) == 0.5
    assert math.isnan(once(auroc(scores, np.ones((2, 2)))[0], 2))
    assert math.isnan(once(auroc_within(scores, labels)[0], 2))  # no group holds both


def test_what_differs_between_prompts_plays_no_part_within_groups():
    """Easy prompts make confident and right completions: overall 1, within groups the very opposite."""
    x = np.array([[0.0, 1.0], [10.0, 11.0], [20.0, 21.0]])
    y = np.array([[1.0, 0.0], [101.0, 100.0], [201.0, 200.0]])
    within, groups = correlation_within(x, y)
    assert (once(within, 3), groups) == (-1.0, 3)
    assert once(correlation(x, y)[0], 3) > 0.99


def test_groups_that_say_nothing_or_are_gated_are_left_out():
    x = np.array([[1.0, 2.0], [5.0, 5.0], [1.0, 9.0], [3.0, NAN]])
    y = np.array([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    assert correlation_within(x, y)[1] == 2
    within, groups = correlation_within(x, y, np.array([True, True, False, True]))
    assert (once(within, 4), groups) == (1.0, 1)


def test_a_mean_over_tokens_is_a_ratio_of_sums():
    statistic = ratio(np.array([1.0, 6.0]), np.array([1.0, 3.0]))
    np.testing.assert_allclose(statistic(np.array([[1.0, 1.0], [2.0, 0.0], [0.0, 2.0]])), [7 / 4, 1.0, 2.0])


def test_resamples_draw_as_many_prompts_as_there_are_and_always_the_same():
    counts = resample(7, 50, 3)
    assert counts.shape == (50, 7)
    assert (counts.sum(1) == 7).all()
    assert (counts == resample(7, 50, 3)).all()
    assert (counts != resample(7, 50, 4)).any()


def test_intervals_leave_out_what_is_not_defined():
    assert interval(np.array([NAN, NAN, 1.0])) == pytest.approx((NAN, NAN), nan_ok=True)
    assert interval(np.array([NAN, 1.0, 1.0])) == (1.0, 1.0)
    few = np.array([[1.0, 0.0]] * (GROUPS_LEAST - 1) + [[1.0, 1.0]])
    within, groups = correlation_within(few, few)
    assert groups == GROUPS_LEAST - 1
    found = estimate(within, resample(len(few)), groups)
    assert found.value == 1.0
    assert math.isnan(found.low) and not found.excludes_zero()


def test_the_cluster_bootstrap_covers_the_truth_where_rows_are_no_independent_evidence():
    """The mean of 30 prompts x 8 completions that share their prompt's level: rows alone would cover a third."""
    hits = naive_hits = 0
    generator = np.random.default_rng(0)
    for trial in range(200):
        values = generator.normal(size=(30, 1)) + 0.5 * generator.normal(size=(30, 8))
        low, high = estimate(ratio(values.mean(1), np.ones(30)), resample(30, 300, trial), 30)[1:3]
        hits += low <= 0 <= high
        half = 1.96 * values.std(ddof=1) / math.sqrt(values.size)
        naive_hits += abs(values.mean()) <= half
    assert 0.88 <= hits / 200 <= 0.99
    assert naive_hits / 200 < 0.7


def test_intervals_of_the_correlation_within_groups_cover_the_truth():
    hits = 0
    generator = np.random.default_rng(1)
    for trial in range(150):
        x = generator.normal(size=(40, 6))
        y = 0.5 * x + math.sqrt(0.75) * generator.normal(size=(40, 6))  # correlation 0.5, also within
        within, groups = correlation_within(x + 5 * generator.normal(size=(40, 1)), y)
        found = estimate(within, resample(40, 300, trial), groups)
        hits += found.low <= 0.5 <= found.high
    assert 0.87 <= hits / 150 <= 0.99
