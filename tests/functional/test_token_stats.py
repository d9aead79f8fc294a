import math
import re

import pytest
import torch
from torch.autograd import gradcheck

from rlif_lightning.functional.token_stats import TokenStats, token_logprobs, token_stats

OWN = {"squares": lambda log_p: log_p.exp().square().sum(-1), "largest": lambda log_p: log_p.exp().amax(-1)}


def naive(logits, ids, temperature):
    """The formulas of the docstring as loops over Python floats; [R, V], [R] -> three lists."""
    out = TokenStats([], [], [], {name: [] for name in OWN})
    for row, token in zip(logits.double().tolist(), ids.tolist(), strict=True):
        z = [x / temperature for x in row]
        lse = max(z) + math.log(sum(math.exp(x - max(z)) for x in z))
        p = [math.exp(x - lse) for x in z]
        out.logprob.append(z[token] - lse)
        out.entropy.append(-sum(q * math.log(q) for q in p if q > 0))
        out.self_certainty.append(sum((math.log(1 / len(z)) - (x - lse)) / len(z) for x in z))
        out.own["squares"].append(sum(q * q for q in p))
        out.own["largest"].append(max(p))
    return out


def close(got, want, **tolerance):
    for g, w, name in zip(got[:3], want[:3], TokenStats._fields, strict=False):
        w = torch.as_tensor(w, dtype=g.dtype)
        torch.testing.assert_close(g, w.view_as(g), msg=lambda m, name=name: f"{name}: {m}", **tolerance)


def sample(rows=40, vocabulary=23, dtype=torch.float64, seed=0, spread=3.0):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocabulary, generator=g, dtype=torch.float64) * spread + 5
    return logits.to(dtype), torch.randint(vocabulary, (rows,), generator=g)


@pytest.mark.parametrize("temperature", [1.0, 0.9, 2.5])
def test_against_naive_loops(temperature):
    logits, ids = sample()
    close(token_stats(logits, ids, temperature), naive(logits, ids, temperature), rtol=1e-11, atol=1e-11)
    got = token_stats(logits.float(), ids, temperature)
    assert all(x.dtype == torch.float32 for x in got.tensors)
    close(got, naive(logits.float(), ids, temperature), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_further_statistics_where_asked_for(temperature):
    logits, ids = sample()
    got, want = token_stats(logits, ids, temperature, OWN), naive(logits, ids, temperature)
    assert got.own.keys() == OWN.keys() and not token_stats(logits, ids, temperature).own
    for name, value in got.own.items():
        wanted = torch.tensor(want.own[name], dtype=value.dtype)
        torch.testing.assert_close(value, wanted, rtol=1e-11, atol=1e-11)


def test_the_tensors_keep_their_names():
    logits, ids = sample()
    stats = token_stats(logits, ids, own=OWN)
    doubled = stats.map(lambda x: 2 * x)
    assert torch.equal(doubled.entropy, 2 * stats.entropy)
    assert torch.equal(doubled.own["largest"], 2 * stats.own["largest"])
    empty = TokenStats.zeros((4, 2), OWN, torch.device("cpu"))
    assert empty.own.keys() == OWN.keys() and all(x.shape == (4, 2) and not x.any() for x in empty.tensors)


def test_by_hand():
    # z = log(1, 2, 5), so p = 1/8, 2/8, 5/8.
    # logprob of token 2   = log(5/8)                                                   = -0.470004
    # entropy              = (1/8) log 8 + (2/8) log 4 + (5/8) log(8/5)                 =  0.900256
    # self-certainty       = log 8 - log(1 * 2 * 5) / 3 - log 3 = 2.079442 - 0.767528 - 1.098612 = 0.213301
    logits = torch.tensor([1.0, 2.0, 5.0]).log()
    got = token_stats(logits, torch.tensor(2))
    close(got, (-0.470004, 0.900256, 0.213301), rtol=0, atol=2e-6)
    # At temperature 1/2 the logits double: p = 1/30, 4/30, 25/30.
    # log(25/30) = -0.182322; log 30 - (4 log 4 + 25 log 25) / 30 = 0.533962;
    # log 30 - log(100) / 3 - log 3 = 3.401197 - 1.535057 - 1.098612 = 0.767528
    got = token_stats(logits, torch.tensor(2), temperature=0.5)
    close(got, (-0.182322, 0.533962, 0.767528), rtol=0, atol=2e-6)


def test_uniform_has_most_entropy_and_no_self_certainty():
    got = token_stats(torch.full((1, 50), 3.0), torch.tensor([7]))
    close(got, (-math.log(50), math.log(50), 0.0), rtol=1e-6, atol=1e-6)


def test_leading_shape_and_shift_do_not_matter():
    logits, ids = sample(rows=24)
    flat = token_stats(logits, ids, 0.7)
    close(token_stats(logits.view(2, 3, 4, -1), ids.view(2, 3, 4), 0.7), flat)
    close(token_stats(logits + 11, ids, 0.7), flat, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_logprobs_alone_are_the_same_numbers(dtype, temperature):
    logits, ids = sample(dtype=dtype)
    want = token_stats(logits, ids, temperature).logprob
    assert torch.equal(token_logprobs(logits, ids, temperature), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 0.9])
def test_half_precision_is_raised_before_any_arithmetic(dtype, temperature):
    logits, ids = sample(dtype=dtype, vocabulary=1000)
    got = token_stats(logits, ids, temperature)
    assert all(x.dtype == torch.float32 for x in got[:3])
    # To fp32 accuracy: dividing by the temperature in bf16 would be off by 1e-2.
    close(got, naive(logits, ids, temperature), rtol=1e-5, atol=1e-5)


def test_extreme_logits():
    # One entry at 1e4, nine at -1e4: p = (1, 0, ...). Self-certainty = 1e4 - (1e4 - 9e4) / 10 - log 10.
    logits = torch.full((2, 10), -1e4)
    logits[:, 0] = 1e4
    got = token_stats(logits, torch.tensor([0, 1]))
    want = 1e4 + 8e3 - math.log(10)
    close(got, ([0.0, -2e4], [0.0, 0.0], [want, want]), rtol=1e-6, atol=1e-6)
    # A large common level must not cost digits: lse - sum p z in fp32 would be off by 1e-3 here.
    logits, ids = sample(dtype=torch.float32)
    raised = (logits * 8).round() / 8 + 1e4  # exact in fp32
    close(token_stats(raised, ids), naive(raised, ids, 1.0), rtol=1e-5, atol=1e-5)


def test_vocabulary_of_one():
    close(token_stats(torch.tensor([[4.0]]), torch.tensor([0])), (0.0, 0.0, 0.0), rtol=0, atol=0)


def test_masked_vocabulary_entries_count_nothing_in_the_entropy():
    logits, ids = sample(rows=5, vocabulary=6)
    ids = ids.clamp(max=3)
    masked = logits.clone()
    masked[:, 4:] = -torch.inf
    got, want = token_stats(masked, ids), token_stats(logits[:, :4], ids)
    torch.testing.assert_close(got.logprob, want.logprob)
    torch.testing.assert_close(got.entropy, want.entropy)
    assert (got.self_certainty == torch.inf).all()
    # the gradient of the entropy too: 0 * -inf must not appear on the way back
    (full,) = torch.autograd.grad(token_stats(m := masked.requires_grad_(), ids).entropy.sum(), m)
    (part,) = torch.autograd.grad(token_stats(x := logits[:, :4].requires_grad_(), ids).entropy.sum(), x)
    torch.testing.assert_close(full[:, :4], part)
    assert (full[:, 4:] == 0).all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradients(temperature):
    logits, ids = sample(rows=3, vocabulary=5, spread=1.0)
    logits.requires_grad_()
    assert gradcheck(lambda z: token_stats(z, ids, temperature, OWN).tensors, logits)
    assert gradcheck(lambda z: token_logprobs(z, ids, temperature), logits)


@pytest.mark.parametrize("function", [token_stats, token_logprobs])
@pytest.mark.parametrize("ids", [(2, 3), (2,), (2, 4, 1)])
def test_misaligned_ids_are_refused(function, ids):
    """Gather takes a shorter index in silence and would score every token one position off."""
    message = f"got: ids {list(ids)}, logits [2, 4, 7]\n  expected: ids [2, 4]"
    with pytest.raises(ValueError, match=re.escape(message)):
        function(torch.zeros(2, 4, 7), torch.zeros(ids, dtype=torch.long))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match="temperature"):
        token_stats(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), temperature)
