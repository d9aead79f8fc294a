import itertools

import pytest

from rlif_lightning.grading import agreement, maj_at_k, mean_interval, pass_at_k
from rlif_lightning.grading.metrics import bootstrap_interval


def test_pass_at_k_by_hand():
    # 2 of 4 are right: C(2,2)/C(4,2) = 1/6 of the pairs hold none
    assert pass_at_k(4, 2, 2) == pytest.approx(5 / 6)
    assert pass_at_k(10, 3, 1) == pytest.approx(0.3)
    assert pass_at_k(5, 0, 5) == 0.0
    assert pass_at_k(5, 4, 2) == 1.0


def test_pass_at_k_is_the_mean_over_all_choices():
    for n, c, k in itertools.product(range(1, 7), range(7), range(1, 7)):
        if c <= n and k <= n:
            choices = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, choices)) / len(choices))


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, 2, 5), (4, 2, 0), (4, -1, 1)])
def test_pass_at_k_refuses_impossible_counts(n, c, k):
    with pytest.raises(ValueError, match="pass_at_k needs"):
        pass_at_k(n, c, k)


def test_maj_at_k():
    answers, correct = ["7", "8", None, "8", None, None], [True, False, False, False, False, False]
    assert maj_at_k(answers, correct, 1) == 1.0
    assert maj_at_k(answers, correct, 2) == 1.0  # a tie: the first to occur
    assert maj_at_k(answers, correct, 4) == 0.0  # 8 twice
    assert maj_at_k(answers, correct, 6) == 0.0  # three missing answers are no majority
    assert maj_at_k([None, None, "7"], [False, False, True], 3) == 1.0
    assert maj_at_k([None, None], [False, False], 2) == 0.0
    with pytest.raises(ValueError, match="maj_at_k needs"):
        maj_at_k(["7"], [True], 2)


def test_agreement():
    assert agreement(["1", "1", "2", None]) == 0.5
    assert agreement([None, None, None, "2"]) == 0.25
    assert agreement([None, None]) == 0.0
    assert agreement(["3"]) == 1.0
    with pytest.raises(ValueError, match="at least one"):
        agreement([])


def test_bootstrap_interval_is_repeatable_and_shrinks():
    few, many = [0.0, 1.0] * 20, [0.0, 1.0] * 2_000
    low, high = bootstrap_interval(few)
    assert (low, high) == bootstrap_interval(few)
    assert 0.3 < low < 0.5 < high < 0.7
    narrow = bootstrap_interval(many, resamples=1_000)
    assert narrow[1] - narrow[0] < (high - low) / 5
    assert bootstrap_interval([1.0, 1.0]) == (1.0, 1.0)


def test_bootstrap_interval_does_not_depend_on_the_size_of_its_chunks():
    """The widths follow the standard error whatever the number of problems: 2 * 1.96 * 0.5 / sqrt(n)."""
    for n in (100, 3_000):
        low, high = bootstrap_interval([0.0, 1.0] * (n // 2), resamples=2_000)
        assert high - low == pytest.approx(3.92 * 0.5 / n**0.5, rel=0.1)


def test_bootstrap_interval_covers_the_truth_as_often_as_it_says():
    import numpy as np

    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        values = (generator.random(100) < 0.4).astype(float)
        low, high = bootstrap_interval(values, resamples=500)
        covered += low <= 0.4 <= high
    assert 0.9 <= covered / 200 <= 0.99


@pytest.mark.parametrize("wrong", [{"values": []}, {"values": [1.0], "resamples": 0}])
def test_bootstrap_interval_refuses_what_has_no_answer(wrong):
    with pytest.raises(ValueError, match="bootstrap_interval needs"):
        bootstrap_interval(**wrong)


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_intervals_of_shares_are_those_of_newcombe(right, n, low, high):
    """Wilson's score interval without correction in Newcombe 1998, table I; turned round, that of what is wrong."""
    assert mean_interval([1.0] * right + [0.0] * (n - right)) == pytest.approx((low, high), abs=5e-5)
    assert mean_interval([0.0] * right + [1.0] * (n - right)) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_intervals_of_means_over_samples_are_bootstrapped():
    values = [0.0, 0.5, 1.0, 0.25] * 10
    assert mean_interval(values) == bootstrap_interval(values)
    with pytest.raises(ValueError, match="interval needs"):
        mean_interval([])
