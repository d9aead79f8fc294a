import itertools

import pytest
import torch

from rlif_lightning.functional.losses import policy_loss
from rlif_lightning.functional.rewards import self_certainty, token_entropy, trajectory_entropy
from rlif_lightning.functional.token_stats import token_stats

REWARDS = [(self_certainty, 1.0), (token_entropy, -1.0), (trajectory_entropy, 1.0)]


def naive(values, mask, aggregation, sign):
    out = []
    for row, keep in zip(values.tolist(), mask.tolist(), strict=True):
        kept = [v for v, k in zip(row, keep, strict=True) if k]
        total = sum(kept)
        out.append(sign * (total / len(kept) if aggregation == "mean" else total))
    return torch.tensor(out, dtype=values.dtype)


def ragged(n=9, t=7, seed=0):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, t + 1, (n, 1), generator=g)
    return torch.randn(n, t, generator=g, dtype=torch.float64) * 3, torch.arange(t) < lengths


@pytest.mark.parametrize("aggregation", ["mean", "sum"])
@pytest.mark.parametrize(("reward", "sign"), REWARDS)
def test_against_naive_loops(reward, sign, aggregation):
    values, mask = ragged()
    torch.testing.assert_close(
        reward(values, mask, aggregation), naive(values, mask, aggregation, sign), rtol=1e-13, atol=1e-13
    )


def test_by_hand():
    values = torch.tensor([[1.0, 2.0, 6.0], [4.0, 8.0, 99.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    # means 9/3 = 3 and 12/2 = 6; sums 9 and 12
    assert self_certainty(values, mask).tolist() == [3.0, 6.0]
    assert self_certainty(values, mask, "sum").tolist() == [9.0, 12.0]
    assert token_entropy(values, mask, "mean").tolist() == [-3.0, -6.0]
    assert trajectory_entropy(-values, mask, "sum").tolist() == [-9.0, -12.0]


@pytest.mark.parametrize("aggregation", ["mean", "sum"])
@pytest.mark.parametrize(("reward", "sign"), REWARDS)
def test_padding_and_empty_rows(reward, sign, aggregation):
    values, mask = ragged()
    want = reward(values, mask, aggregation)
    garbage = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30]).double().expand(len(values), 4)
    padded = torch.cat([values.where(mask, torch.nan), garbage], 1)
    wide = torch.cat([mask, torch.zeros_like(garbage, dtype=torch.bool)], 1)
    assert torch.equal(reward(padded, wide, aggregation), want)
    wide[3] = False  # no token: unusable, not 0
    got = reward(padded, wide, aggregation)
    assert got.isnan().tolist() == [i == 3 for i in range(len(values))]


@pytest.mark.parametrize("aggregation", ["mean", "sum"])
@pytest.mark.parametrize(("reward", "sign"), REWARDS)
def test_no_gradient_and_fp32_at_least(reward, sign, aggregation):
    values, mask = ragged()
    for dtype, wanted in [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)]:
        got = reward(values.to(dtype).requires_grad_(), mask, aggregation)
        assert not got.requires_grad
        assert got.dtype == wanted
    low = values.bfloat16()
    want = naive(low.double(), mask, aggregation, sign).float()
    torch.testing.assert_close(reward(low, mask, aggregation), want, rtol=1e-6, atol=1e-6)


def test_refusals():
    with pytest.raises(ValueError, match=r"values \[2, 3\], mask \[3\]"):
        self_certainty(torch.zeros(2, 3), torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="'median'"):
        token_entropy(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), "median")


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
    by_trajectory = trajectory_entropy(stats.logprob, mask, "sum")  # [Y] log pi(y)
    by_token = token_entropy(stats.entropy, mask, "sum")  # [Y]
    p = by_trajectory.exp()
    assert len(ids) == 1 + 2 + 4 * 3  # ended after 1, after 2, and of full length
    torch.testing.assert_close(p.sum(), torch.tensor(1.0).double(), rtol=1e-14, atol=0)
    torch.testing.assert_close((p * by_trajectory).sum(), (p * by_token).sum(), rtol=1e-13, atol=0)
    # ... for sums, not for means over completions of different lengths
    means = [trajectory_entropy(stats.logprob, mask), token_entropy(stats.entropy, mask)]
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

    got = reinforce(trajectory_entropy(stats.logprob, mask, "sum"))
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)
    other = reinforce(token_entropy(stats.entropy, mask, "sum"))
    assert (other - want).abs().max() > 1e-3
