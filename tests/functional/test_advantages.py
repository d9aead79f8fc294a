import math

import pytest
import torch

from rlif_lightning.functional.advantages import batch_std, combine_advantages, group_advantages

NAN = math.nan


def naive(rewards, group_size, scale="group", min_spread=0.0, eps=1e-4, baseline="mean"):
    out, gates = [], []
    values = rewards.double().tolist()
    everyone = [r for r in values if not math.isnan(r)]
    centre = sum(everyone) / len(everyone)
    batch = math.sqrt(sum((r - centre) ** 2 for r in everyone) / (len(everyone) - 1))
    for start in range(0, len(values), group_size):
        group = values[start : start + group_size]
        usable = [r for r in group if not math.isnan(r)]
        mean = sum(usable) / len(usable) if usable else 0
        std = math.sqrt(sum((r - mean) ** 2 for r in usable) / (len(usable) - 1)) if len(usable) > 1 else 0
        gate = len(set(usable)) < 2 or std <= min_spread
        gates.append(gate)
        for i, r in enumerate(group):
            base = mean
            if baseline == "leave_one_out" and not gate and not math.isnan(r):
                others = [x for j, x in enumerate(group) if j != i and not math.isnan(x)]
                base = sum(others) / len(others)
            scaled = (r - base) / {"group": std + eps, "batch": batch + eps, "none": 1}[scale]
            out.append(0.0 if gate or math.isnan(r) else scaled)
    return torch.tensor(out, dtype=torch.float64), torch.tensor(gates)


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("eps", [1e-4, 0.5])
@pytest.mark.parametrize("min_spread", [0.0, 1.0])
def test_against_naive_loops(scale, eps, min_spread, baseline):
    g = torch.Generator().manual_seed(0)
    rewards = torch.randn(60, 5, generator=g, dtype=torch.float64) * torch.rand(60, 1, generator=g) * 3
    rewards[torch.rand(60, 5, generator=g) < 0.4] = NAN
    rewards = rewards.flatten()
    std = batch_std(rewards) if scale == "batch" else None
    how = {"scale": scale, "min_spread": min_spread, "eps": eps, "baseline": baseline}
    got, gated = group_advantages(rewards, 5, batch_std=std, **how)
    want, gates = naive(rewards, 5, **how)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    assert torch.equal(gated, gates)
    assert 0 < gates.sum() < 60
    single, _ = group_advantages(rewards.float(), 5, batch_std=std, **how)
    torch.testing.assert_close(single, want.float(), rtol=1e-4, atol=1e-5)


def test_by_hand():
    # mean (1 + 2 + 3 + 6) / 4 = 3; std sqrt((4 + 1 + 0 + 9) / 3) = 2.160247; plus eps 0.1: 2.260247
    got, gated = group_advantages(torch.tensor([1.0, 2.0, 3.0, 6.0]), 4, eps=0.1)
    torch.testing.assert_close(got, torch.tensor([-0.884859, -0.442429, 0.0, 1.327288]), rtol=0, atol=1e-6)
    assert gated.tolist() == [False]
    # the stated default eps: rewards 0 and 2e-4, deviations 1e-4, std sqrt(2) 1e-4, so 1 / (sqrt(2) + 1)
    got, _ = group_advantages(torch.tensor([0.0, 2e-4]), 2)
    torch.testing.assert_close(got, torch.tensor([-0.414214, 0.414214]), rtol=0, atol=1e-5)
    # without scale: the plain differences from the mean
    got, _ = group_advantages(torch.tensor([1.0, 2.0, 3.0, 6.0]), 4, scale="none")
    assert got.tolist() == [-2.0, -1.0, 0.0, 3.0]


def test_groups_are_neighbouring_rows_and_do_not_mix():
    a, b = torch.tensor([1.0, 5.0, 2.0]), torch.tensor([100.0, 700.0, 200.0])
    both, gated = group_advantages(torch.cat([a, b]), 3)
    assert torch.equal(both, torch.cat([group_advantages(a, 3)[0], group_advantages(b, 3)[0]]))
    assert gated.shape == (2,)
    assert both.view(2, 3).sum(1).abs().max() < 1e-6


def test_unusable_rows_are_left_out_not_zeroed():
    got, gated = group_advantages(torch.tensor([5.0, NAN, 7.0, NAN, 9.0]), 5)
    want, _ = group_advantages(torch.tensor([5.0, 7.0, 9.0]), 3)
    assert got[[1, 3]].tolist() == [0.0, 0.0]
    torch.testing.assert_close(got[[0, 2, 4]], want)
    assert gated.tolist() == [False]
    # a self-certainty of +inf (filtered logits) must not turn the group's advantages into nan
    got, _ = group_advantages(torch.tensor([5.0, torch.inf, 7.0, -torch.inf, 9.0]), 5)
    torch.testing.assert_close(got[[0, 2, 4]], want)
    assert got[[1, 3]].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("group", [[NAN, NAN, NAN], [NAN, 4.0, NAN], [2.0, NAN, 2.0]])
@pytest.mark.parametrize("scale", ["group", "none"])
def test_too_few_usable_rows(group, scale):
    got, gated = group_advantages(torch.tensor([*group, 1.0, 2.0, 3.0]), 3, scale=scale)
    assert got[:3].tolist() == [0.0, 0.0, 0.0]
    assert gated.tolist() == [True, False]
    assert got[3:].isfinite().all()


@pytest.mark.parametrize("eps", [1e-4, 0.0])
def test_equal_rewards_are_gated_whatever_their_rounding(eps):
    """The mean of seven equal fp32 numbers may be off by one ulp; that is no spread to standardise."""
    values = torch.linspace(0.1, 12, 200)
    got, gated = group_advantages(values.repeat_interleave(7), 7, eps=eps)
    assert gated.all()
    assert (got == 0).all()


@pytest.mark.parametrize("scale", ["group", "none"])
def test_spread_gate(scale):
    # std of (0, 2, 4) is exactly 2: gated at 2, not below
    rewards = torch.tensor([0.0, 2.0, 4.0, 0.0, 3.0, 6.0])
    assert group_advantages(rewards, 3, scale=scale, min_spread=1.999)[1].tolist() == [False, False]
    got, gated = group_advantages(rewards, 3, scale=scale, min_spread=2.0)
    assert gated.tolist() == [True, False]
    assert got[:3].tolist() == [0.0, 0.0, 0.0]
    assert got[5] > 0 > got[3]


def test_no_gradient_and_fp32_at_least():
    rewards = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    got, gated = group_advantages(rewards, 3)
    assert not got.requires_grad
    assert gated.dtype == torch.bool
    assert group_advantages(rewards.bfloat16(), 3)[0].dtype == torch.float32
    assert group_advantages(rewards.double(), 3)[0].dtype == torch.float64


@pytest.mark.parametrize(("shape", "group_size"), [((5,), 2), ((2, 3), 3), ((4,), 0)])
def test_refuses_what_is_not_groups(shape, group_size):
    with pytest.raises(ValueError, match=rf"group_size {group_size}\n  expected"):
        group_advantages(torch.zeros(shape), group_size)


def test_the_batch_is_that_of_all_processes():
    """Two processes with other numbers of usable rewards give the standard deviation of all of them."""
    parts = torch.tensor([1.0, 4.0, NAN, 2.0]), torch.tensor([7.0, NAN, NAN, 3.0])
    everyone = torch.tensor([1.0, 4.0, 2.0, 7.0, 3.0], dtype=torch.float64)
    sums = []  # what each process would hand over, call by call
    for part in parts:
        calls = []
        batch_std(part, lambda x, calls=calls: calls.append(x.clone()) or x)
        sums.append(calls)
    first = sums[0][0] + sums[1][0]
    mean = first[1] / first[0]
    squares = sum(((p.double()[p.isfinite()] - mean) ** 2).sum() for p in parts)
    for part in parts:
        answers = iter([first, squares])
        torch.testing.assert_close(batch_std(part, lambda x, a=answers: next(a)), everyone.std())
    assert batch_std(torch.tensor([NAN, 3.0])) == 0


def test_refuses_an_unknown_baseline_and_a_missing_std():
    with pytest.raises(ValueError, match="unknown baseline"):
        group_advantages(torch.ones(4), 2, baseline="median")
    with pytest.raises(ValueError, match="std of the batch"):
        group_advantages(torch.ones(4), 2, scale="batch")


def test_refuses_an_unknown_scale():
    with pytest.raises(ValueError, match="'batch'"):
        group_advantages(torch.zeros(4), 2, scale="batch")


def test_combination_is_the_weighted_sum_and_nothing_else():
    a, b = torch.tensor([1.0, -1.0, 0.5]), torch.tensor([2.0, 0.0, -4.0])
    # 2 * 1 - 0.5 * 2 = 1; 2 * -1 - 0 = -2; 2 * 0.5 + 0.5 * 4 = 3
    assert combine_advantages([a, b], [2.0, -0.5]).tolist() == [1.0, -2.0, 3.0]
    assert torch.equal(combine_advantages([a, b], [4.0, -1.0]), 2 * combine_advantages([a, b], [2.0, -0.5]))
    assert torch.equal(combine_advantages([a], [-1.0]), -a)


@pytest.mark.parametrize(
    ("parts", "weights"),
    [([torch.zeros(3)], [1.0, 2.0]), ([], []), ([torch.zeros(3), torch.zeros(1)], [1.0, 1.0])],
)
def test_combination_refuses_a_mismatch(parts, weights):
    with pytest.raises((ValueError, RuntimeError)):
        combine_advantages(parts, weights)
