"""Filters against transformers' warpers, drawing against a naive float64 inverse CDF."""

import math

import pytest
import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from rlif_lightning.errors import UserError
from rlif_lightning.functional.token_stats import token_stats
from rlif_lightning.sampling import Sampling
from rlif_lightning.sampling.token_sampling import BLOCK, TokenSampler, filter_logits, inverse_cdf, uniforms

LARGEST = 1 - 2.0**-24  # the largest uniform number that torch.rand gives


def distribution(**filters):
    return Sampling(max_new_tokens=1, **filters)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# -- filters ---------------------------------------------------------------------------------------------------


def oracle(logits, sampling):
    """transformers' own warpers, in the order in which its generate() applies them."""
    if sampling.top_k:
        logits = TopKLogitsWarper(sampling.top_k)(None, logits)
    if sampling.top_p < 1:
        logits = TopPLogitsWarper(sampling.top_p)(None, logits)
    if sampling.min_p:
        logits = MinPLogitsWarper(sampling.min_p)(None, logits)
    return logits


@pytest.mark.parametrize("width", [2, 7, 1500])
@pytest.mark.parametrize(
    "filters",
    [
        {"top_k": 1},
        {"top_k": 5},
        {"top_k": 10**6},
        {"top_p": 0.9},
        {"top_p": 0.3},
        {"top_p": 1e-6},
        {"top_p": 0.999},
        {"min_p": 0.05},
        {"min_p": 0.99},
        {"top_k": 4, "top_p": 0.8, "min_p": 0.2},
        {"top_k": 50, "top_p": 0.95, "min_p": 0.02},
        {},
    ],
)
def test_filters_are_those_of_transformers(filters, width):
    logits = 2 * torch.randn(64, width, generator=generator(), dtype=torch.float64)
    assert torch.equal(filter_logits(logits, distribution(**filters)), oracle(logits, distribution(**filters)))


def test_the_order_of_the_filters_is_top_k_top_p_min_p():
    """Worked by hand: top-p counts the probability that top-k left over, min-p never drops what they kept."""
    p = torch.tensor([[0.4, 0.2, 0.2 - 1e-6, 0.1, 0.1 - 1e-6]])
    # top-k leaves .5 .25 .25; top-p .7 then takes two of them; of the whole distribution it would take three.
    kept = filter_logits(p.log(), distribution(top_k=3, top_p=0.7)).isfinite()
    assert kept.tolist() == [[True, True, False, False, False]]
    assert filter_logits(p.log(), distribution(top_p=0.7)).isfinite().sum() == 3
    assert filter_logits(p.log(), distribution(min_p=0.49)).isfinite().sum() == 3
    assert filter_logits(p.log(), distribution(min_p=0.51)).isfinite().sum() == 1


def test_equal_logits():
    """top-k and min-p keep every token tied with the last one kept; top-p as few as reach the mass."""
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0, 2.0]])
    for filters in ({"top_k": 2}, {"min_p": 0.5}):
        ours = filter_logits(logits, distribution(**filters))
        assert torch.equal(ours, oracle(logits, distribution(**filters)))
        assert ours.isfinite().sum(1).tolist() == [3, 5]
    ours = filter_logits(logits, distribution(top_p=0.5))
    assert (
        ours.isfinite().sum(1).tolist()
        == oracle(logits, distribution(top_p=0.5)).isfinite().sum(1).tolist()
        == [2, 3]
    )
    assert not ours[0, [0, 4]].isfinite().any()
    exactly = torch.tensor([[4.0, 4.0, -torch.inf]])  # one of two halves reaches 0.5: the other is left out
    kept = filter_logits(exactly, distribution(top_p=0.5)).isfinite()
    assert int(kept.sum()) == int(oracle(exactly, distribution(top_p=0.5)).isfinite().sum()) == 1


@pytest.mark.parametrize("filters", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 0.999999}])
def test_the_most_likely_token_always_stays(filters):
    logits = 3 * torch.randn(200, 700, generator=generator(1))
    kept = filter_logits(logits, distribution(**filters)).isfinite()
    assert torch.equal(kept, torch.nn.functional.one_hot(logits.argmax(-1), 700).bool())


def test_a_peaked_row_survives_every_filter():
    """A probability of exactly 1 leaves nothing for the others: no nan, one token."""
    logits = torch.full((1, 6), -1e4)
    logits[0, 3] = 1e4
    out = filter_logits(logits, distribution(top_k=4, top_p=0.9, min_p=0.1))
    assert out.isfinite().tolist() == [[False, False, False, True, False, False]]


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": 1.0},
        {"min_p": -0.1},
        {"statistics_temperature": -2.0},
        {"statistics_temperature": 0.0},
        {"max_new_tokens": 0},
    ],
)
def test_a_distribution_out_of_range_is_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**{"max_new_tokens": 1, **wrong})


# -- drawing ---------------------------------------------------------------------------------------------------


def naive(weights, u):
    """First index whose cumulative weight, in float64, is above u times the total."""
    total, target = 0.0, u * math.fsum(weights)
    for index, weight in enumerate(weights):
        total += weight
        if weight > 0 and total > target:
            return index
    return max(i for i, w in enumerate(weights) if w > 0)


@pytest.mark.parametrize("width", [1, 2, 7, BLOCK - 1, BLOCK, BLOCK + 1, 1500])
def test_drawing_is_the_inverse_of_the_cumulative_distribution(width):
    """Where rounding moves a boundary, the draw may fall on a neighbour; anywhere else it is the same token."""
    rows = 500
    weights = (2 * torch.randn(rows, width, generator=generator(2))).exp()
    weights[torch.rand(rows, width, generator=generator(3)) < 0.3] = 0
    weights[:, width // 2] += 0.1
    u = torch.rand(rows, generator=generator(4))
    drawn = inverse_cdf(weights, u).tolist()
    differ = 0
    for row, number, token in zip(weights.tolist(), u.tolist(), drawn, strict=True):
        expected = naive(row, number)
        if token != expected:
            differ += 1
            edge = math.fsum(row[: max(token, expected)]) / math.fsum(row)
            assert edge == pytest.approx(number, abs=1e-5)
    assert differ <= rows // 50


def chi_square_p(counts, probabilities):
    """P(chi-square with as many degrees of freedom is larger); bins expected below 5 times are merged."""
    expected = probabilities.double() * counts.sum()
    order = expected.argsort()
    counts, expected = counts[order].double(), expected[order]
    small = int((expected.cumsum(0) < 5).sum()) + 1
    counts = torch.cat([counts[:small].sum()[None], counts[small:]])
    expected = torch.cat([expected[:small].sum()[None], expected[small:]])
    statistic = ((counts - expected).square() / expected).sum()
    freedom = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


@pytest.mark.parametrize(("width", "draws"), [(7, 20_000), (1500, 100_000)])
def test_tokens_are_drawn_by_their_probability(width, draws):
    logits = 1.5 * torch.randn(width, generator=generator(5))
    logits[width // 3] = -torch.inf
    counts = torch.zeros(width)
    for seed, part in enumerate(torch.arange(draws).split(10_000)):
        u = torch.rand(len(part), generator=generator(100 + seed))
        counts += inverse_cdf(logits.exp().expand(len(part), -1), u).bincount(minlength=width)
    assert counts[width // 3] == 0
    assert chi_square_p(counts, logits.softmax(0)) > 0.001
    wrong = (logits * 1.1).softmax(0)
    assert chi_square_p(counts, wrong) < 0.001  # the test would have noticed a wrong temperature


EDGES = [0.0, 2.0**-24, 0.5, LARGEST]


@pytest.mark.parametrize("u", EDGES)
@pytest.mark.parametrize("width", [1, 7, BLOCK, 1500])
def test_one_positive_weight_is_always_drawn(width, u):
    for scale in (1.0, 1e-38, 1e30):
        weights = scale * torch.eye(width)
        assert torch.equal(inverse_cdf(weights, torch.full((width,), u)), torch.arange(width))


@pytest.mark.parametrize("u", EDGES)
def test_the_ends_of_the_unit_interval(u):
    """u = 0 takes the first positive weight, the largest u the last; zeros around them are never drawn."""
    weights = torch.zeros(1, 1500)
    weights[0, 700:900] = 1.0
    token = int(inverse_cdf(weights, torch.tensor([u])))
    assert token == {0.0: 700, 2.0**-24: 700, 0.5: 800, LARGEST: 899}[u]


def test_a_token_of_weight_zero_is_never_drawn():
    """Sparse rows with weights of many magnitudes: rounding in either level must not land next to a token."""
    rows = 4000
    for width in (7, 600, 1500):
        magnitude = 30 * torch.rand(rows, width, generator=generator(6)) - 25
        weights = 10**magnitude
        weights[torch.rand(rows, width, generator=generator(7)) < 0.9] = 0
        weights[:, width // 3] += 1e-30
        for u in (*EDGES, None):
            numbers = torch.rand(rows, generator=generator(8)) if u is None else torch.full((rows,), u)
            token = inverse_cdf(weights, numbers)
            assert (token >= 0).all() and (token < width).all()
            assert (weights.gather(1, token[:, None]) > 0).all()


def test_rounding_between_blocks_does_not_fall_on_a_leading_zero():
    """Tiny weights in front of large blocks, as a filter leaves them: the rest inside a block may round to 0."""
    weights = torch.zeros(2000, 3 * BLOCK)
    weights[:, :BLOCK] = torch.rand(2000, BLOCK, generator=generator(9)) * 1e-7
    weights[:, BLOCK + 5] = 1e-9
    weights[:, 2 * BLOCK + 100 :] = torch.rand(2000, BLOCK - 100, generator=generator(10))
    cumulative = weights.double().cumsum(1)
    edge = cumulative[:, [BLOCK - 1, BLOCK + 5]] / cumulative[:, -1:]
    for u in (edge[:, 0].float(), edge[:, 1].float(), edge[:, 1].float().nextafter(torch.tensor(0.0))):
        token = inverse_cdf(weights, u)
        assert (weights.gather(1, token[:, None]) > 0).all()


def test_a_cumulative_sum_that_rounds_unevenly(monkeypatch):
    """A parallel scan, as on a GPU, is not monotone to the last bit (here exaggerated): the draw fell on a zero."""
    exact = torch.Tensor.cumsum

    def scan(x, dim):
        noise = torch.rand(x.shape, generator=generator(11)) * 1e-3
        return exact(x, dim) * (1 + noise)

    monkeypatch.setattr(torch.Tensor, "cumsum", scan)
    weights = torch.rand(5000, 1500, generator=generator(12))
    weights[torch.rand(5000, 1500, generator=generator(13)) < 0.9] = 0
    token = inverse_cdf(weights, torch.rand(5000, generator=generator(14)))
    assert (weights.gather(1, token[:, None]) > 0).all()


def test_uniform_numbers_belong_to_their_seed():
    seeds = torch.tensor([3, 2**62, 5])
    table = uniforms(seeds, 6)
    assert table.shape == (3, 6) and (table >= 0).all() and (table < 1).all()
    assert torch.equal(uniforms(seeds.flip(0), 6), table.flip(0))
    assert torch.equal(uniforms(seeds, 4), table[:, :4])
    assert len(table.flatten().unique()) == 18


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("greedy", [False, True])
def test_statistics_beside_the_draw(scale, greedy):
    """Against float64; logits far from 0, flat and peaked; a vocabulary that no block divides."""
    logits = torch.randn(7, 1201, generator=generator(20)) * scale + 1e3
    u = None if greedy else torch.rand(7, generator=generator(21))
    draw = TokenSampler()
    draw(torch.randn(9, 1201), None)  # what its buffer held before does not matter
    token, stats = draw(logits.clone(), u)
    if greedy:
        assert torch.equal(token, logits.argmax(-1))
    else:
        assert torch.equal(token, inverse_cdf((logits - logits.amax(-1, keepdim=True)).exp(), u))
    expected = token_stats(logits.double(), token)
    for mine, exact in zip(stats[:3], expected[:3], strict=True):
        torch.testing.assert_close(mine.double(), exact, atol=2e-5 * max(1, scale / 30), rtol=1e-5)
    assert not stats.own
