import itertools
import math

import pytest
import torch

from rlif_lightning.functional.aggregation import aggregate
from rlif_lightning.functional.token_stats import token_stats
from tests.functional.loss_calls import policy_loss

AGGREGATIONS = ["mean", "sum", "last_k", "bottom_q"]
K, Q = 3, 0.4  # of at most 7 tokens


def naive(values, mask, aggregation, k=K, q=Q):
    out = []
    for row, keep in zip(values.tolist(), mask.tolist(), strict=True):
        kept = [v for v, k in zip(row, keep, strict=True) if k]
        if aggregation == "last_k":
            kept = kept[-k:]
        if aggregation == "bottom_q":
            kept = sorted(kept)[: math.ceil(q * len(kept))]
        out.append(sum(kept) if aggregation == "sum" else sum(kept) / len(kept))
    return torch.tensor(out, dtype=values.dtype)


def ragged(n=9, t=7, seed=0):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, t + 1, (n, 1), generator=g)
    return torch.randn(n, t, generator=g, dtype=torch.float64) * 3, torch.arange(t) < lengths


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_against_naive_loops(aggregation):
    values, mask = ragged()
    want = naive(values, mask, aggregation)
    torch.testing.assert_close(aggregate(values, mask, aggregation, K, Q), want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("aggregation", "k", "q"),
    [("last_k", 1, 0.2), ("last_k", 6, 0.2), ("last_k", 99, 0.2), *[("bottom_q", 1, q) for q in (0.01, 0.2, 0.5, 1)]],
)
def test_windows_against_naive_loops(aggregation, k, q, seed):
    values, mask = ragged(n=20, t=11, seed=seed)
    want = naive(values, mask, aggregation, k, q)
    torch.testing.assert_close(aggregate(values, mask, aggregation, k, q), want, rtol=1e-13, atol=1e-13)


def test_by_hand():
    values = torch.tensor([[1.0, 2.0, 6.0], [4.0, 8.0, 99.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    # means 9/3 = 3 and 12/2 = 6; sums 9 and 12
    assert aggregate(values, mask).tolist() == [3.0, 6.0]
    assert aggregate(values, mask, "sum").tolist() == [9.0, 12.0]
    # the last two of the first row are 2 and 6; the second row has but two
    assert aggregate(values, mask, "last_k", k=2).tolist() == [4.0, 6.0]
    # ceil(0.5 * 3) = 2 and ceil(0.5 * 2) = 1 tokens, those of lowest value
    assert aggregate(values, mask, "bottom_q", q=0.5).tolist() == [1.5, 4.0]
    assert aggregate(-values, mask, "bottom_q", q=0.5).tolist() == [-4.0, -8.0]


def test_a_share_of_tokens_is_rounded_up_from_its_decimals():
    """0.07 * 100 is 7.000000000000001 in floats, whose ceiling would take an eighth token."""
    values = torch.arange(100.0, dtype=torch.float64)[None]
    mask = torch.ones_like(values, dtype=torch.bool)
    assert math.ceil(0.07 * 100) == 8
    assert aggregate(values, mask, "bottom_q", q=0.07).item() == 3.0  # mean of 0 .. 6
    assert aggregate(values, mask, "bottom_q", q=1 / 3).item() == 16.5  # ceil(33.3) = 34: mean of 0 .. 33
    assert aggregate(values, mask, "bottom_q", q=1e-9).item() == 0.0  # at least one token


def test_the_defaults_of_the_windows():
    values, mask = ragged(n=6, t=40)
    for aggregation in AGGREGATIONS:
        want = aggregate(values, mask, aggregation, k=16, q=0.2)
        assert torch.equal(aggregate(values, mask, aggregation), want)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_padding_and_empty_rows(aggregation):
    values, mask = ragged()
    want = aggregate(values, mask, aggregation, K, Q)
    garbage = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30]).double().expand(len(values), 4)
    padded = torch.cat([values.where(mask, torch.nan), garbage], 1)
    wide = torch.cat([mask, torch.zeros_like(garbage, dtype=torch.bool)], 1)
    assert torch.equal(aggregate(padded, wide, aggregation, K, Q), want)
    wide[3] = False  # no token: unusable, not 0
    got = aggregate(padded, wide, aggregation, K, Q)
    assert got.isnan().tolist() == [i == 3 for i in range(len(values))]
    assert aggregate(padded[:, :0], wide[:, :0], aggregation).isnan().all()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_no_gradient_and_fp32_at_least(aggregation):
    values, mask = ragged()
    for dtype, wanted in [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)]:
        got = aggregate(values.to(dtype).requires_grad_(), mask, aggregation, K, Q)
        assert not got.requires_grad
        assert got.dtype == wanted
    low = values.bfloat16()
    want = naive(low.double(), mask, aggregation).float()
    torch.testing.assert_close(aggregate(low, mask, aggregation, K, Q), want, rtol=1e-6, atol=1e-6)


def test_refusals():
    ones = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"values \[2, 3\], mask \[3\]"):
        aggregate(torch.zeros(2, 3), ones[0])
    with pytest.raises(ValueError, match="'median'"):
        aggregate(torch.zeros(2, 3), ones, "median")
    for k, q in [(0, 0.2), (1, 0.0), (1, 1.1), (1, math.nan)]:
        with pytest.raises(ValueError, match=f"k {k}, q {q}"):
            aggregate(torch.zeros(2, 3), ones, "mean", k, q)


END, V, T = 0, 3, 3


def every_completion(logits):
    """All completions of a tabular policy over prefixes: ids [Y, T], mask [Y, T], rows of logits [Y, T, V].

    The end token closes a completion early, so lengths differ; a table row belongs to each prefix.
    """
    prefixes = [p for t in range(T) for p in itertools.product(range(1, V), repeat=t)]
    row = {p: i for i, p in enumerate(prefixes)}
    ids, mask, index = [], [], []
    for y in itertools.product(range(V), repeat=T):
        length = y.index(END) + 1 if END in y else T
        if any(y[length:]):
            continue  # the same completion with another padding
        ids.append(y)
        mask.append([t < length for t in range(T)])
        index.append([row[y[:t]] if t < length else 0 for t in range(T)])
    return torch.tensor(ids), torch.tensor(mask), logits[torch.tensor(index)]


def tabular_policy(seed=0):
    rows = sum((V - 1) ** t for t in range(T))
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 1.5


def test_expected_logprob_is_minus_expected_entropy():
    """On policy, E[log pi(y)] = -E[sum_t H_t] exactly: the two entropy rewards, summed, share their value."""
    ids, mask, logits = every_completion(tabular_policy())
    stats = token_stats(logits, ids)
    by_trajectory = aggregate(stats.logprob, mask, "sum")  # [Y] log pi(y)
    by_token = aggregate(-stats.entropy, mask, "sum")  # [Y]
    p = by_trajectory.exp()
    assert len(ids) == 1 + 2 + 4 * 3  # ended after 1, after 2, and of full length
    torch.testing.assert_close(p.sum(), torch.tensor(1.0).double(), rtol=1e-14, atol=0)
    torch.testing.assert_close((p * by_trajectory).sum(), (p * by_token).sum(), rtol=1e-13, atol=0)
    # ... for sums, not for means over completions of different lengths
    means = [aggregate(stats.logprob, mask), aggregate(-stats.entropy, mask)]
    assert abs((p * (means[0] - means[1])).sum()) > 1e-3


def test_trajectory_reward_has_the_gradient_of_minus_the_entropy():
    """REINFORCE with r = log pi(y), through the reward and the loss, is gradient ascent on -H(Y).

    The reward of token entropy has the same expected value but, held constant, another gradient.
    """
    table = tabular_policy().requires_grad_()
    ids, mask, logits = every_completion(table)
    stats = token_stats(logits, ids)
    log_py = stats.logprob.where(mask, 0).sum(1)
    entropy = -(log_py.exp() * log_py).sum()
    (want,) = torch.autograd.grad(entropy, table, retain_graph=True)

    def reinforce(reward):
        # an expectation over completions: each weighted with its probability, divided by 1
        loss = policy_loss(stats.logprob, log_py.exp() * reward, mask, 1.0, loss="dapo").loss
        return torch.autograd.grad(loss, table, retain_graph=True)[0]

    got = reinforce(aggregate(stats.logprob, mask, "sum"))
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)
    other = reinforce(aggregate(-stats.entropy, mask, "sum"))
    assert (other - want).abs().max() > 1e-3
