import pytest
import torch
from torch import nn

from rlif_lightning.functional.chunked import (
    CHUNK_BYTES,
    LinearHead,
    chunk_rows,
    chunked_logprobs,
    chunked_stats,
    chunks,
)
from rlif_lightning.functional.token_stats import token_logprobs, token_stats

M, H, V = 11, 6, 29
OWN = {"largest": lambda log_p: log_p.amax(-1), "squares": lambda log_p: log_p.exp().square().sum(-1)}


class SoftcapHead(nn.Module):
    """A head that no closed form serves: low-rank update, bias, softcap, dropout."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(H, V)
        self.down, self.up = nn.Linear(H, 2, bias=False), nn.Linear(2, V, bias=False)
        self.base.weight.requires_grad_(False)

    def forward(self, hidden):
        return 3 * torch.tanh((self.base(hidden) + self.up(self.down(hidden))) / 3)


def sample(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return torch.randn(M, H, dtype=dtype) * 2, SoftcapHead().to(dtype), torch.randint(V, (M,))


@pytest.mark.parametrize("chunk", [1, 3, M, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("gradient", [True, False])
def test_as_the_plain_statistics(chunk, temperature, gradient):
    hidden, head, ids = sample()
    with torch.set_grad_enabled(gradient):
        want = token_stats(head(hidden), ids, temperature, OWN)
        got = chunked_stats(hidden, head, ids, temperature, OWN, chunk=chunk)
        assert got.own.keys() == want.own.keys() == OWN.keys()
        for g, w in zip(got.tensors, want.tensors, strict=True):
            assert g.requires_grad == gradient
            torch.testing.assert_close(g, w)
        torch.testing.assert_close(chunked_logprobs(hidden, head, ids, temperature, chunk=chunk), want.logprob)


def test_statistics_see_no_more_than_a_chunk():
    hidden, head, ids = sample()
    seen = []

    def counted(log_p):
        seen.append(tuple(log_p.shape))
        return log_p.sum(-1)

    with torch.no_grad():
        got = chunked_stats(hidden, head, ids, own={"counted": counted}, chunk=3)
    assert seen == [(3, V)] * 3 + [(2, V)] and got.own["counted"].shape == (M,)


@pytest.mark.parametrize("chunk", [1, 3, M])
def test_gradients_of_any_head(chunk):
    hidden, head, ids = sample()
    leaves = [hidden.requires_grad_(), *(p for p in head.parameters() if p.requires_grad)]
    u = torch.randn(3, M, dtype=hidden.dtype)

    def weighted(logprob, entropy, self_certainty=0, *_):
        return (logprob * u[0] + entropy * u[1] + self_certainty * u[2]).sum()

    def scalars():
        yield (
            (token_logprobs(head(hidden), ids, 0.7) * u[0]).sum(),
            (chunked_logprobs(hidden, head, ids, 0.7, chunk=chunk) * u[0]).sum(),
        )
        yield (
            weighted(*token_stats(head(hidden), ids, 0.7)[:2]),
            weighted(*chunked_stats(hidden, head, ids, 0.7, chunk=chunk)[:2]),
        )
        yield (
            weighted(*token_stats(head(hidden), ids, 0.7)),
            weighted(*chunked_stats(hidden, head, ids, 0.7, chunk=chunk)),
        )

    for want, got in scalars():
        for g, w in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
            assert w.abs().max() > 1e-3
            torch.testing.assert_close(g, w)


def test_the_backward_draws_the_same_dropout():
    hidden, head, ids = sample()
    hidden.requires_grad_()
    dropout = nn.Dropout(0.5)
    seen = []

    def noisy(h):
        seen.append(dropout(h))
        return head(seen[-1])

    chunked_logprobs(hidden, noisy, ids, chunk=4).sum().backward()
    first, again = seen[:3], seen[3:]
    assert len(again) == 3
    assert all(any(torch.equal(x, y) for y in again) for x in first)


@pytest.mark.parametrize("scale", [1.0, 0.125, 0.3])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_plain_head_has_the_logits_of_linear_bit_for_bit(scale, temperature, autocast):
    torch.manual_seed(0)
    for rows, features, vocabulary in [(1, 8, 50), (5, 64, 1000), (64, 256, 2048), (37, 48, 513)]:
        hidden, weight = torch.randn(rows, features), torch.randn(vocabulary, features)
        ids = torch.randint(vocabulary, (rows,))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            head = LinearHead(weight, scale)
            want = nn.functional.linear(hidden, weight)
            want = want if scale == 1.0 else scale * want
            got = head(hidden)
            assert got.dtype == want.dtype == (torch.bfloat16 if autocast else torch.float32)
            assert torch.equal(got, want)
            got = chunked_logprobs(hidden, head, ids, temperature, chunk=rows)
            torch.testing.assert_close(got, token_logprobs(want, ids, temperature), atol=1e-5, rtol=1e-6)
            got = chunked_stats(hidden, head, ids, temperature, chunk=rows)
            assert all(torch.equal(g, w) for g, w in zip(got[:3], token_stats(want, ids, temperature), strict=False))


def test_a_plain_head_reuses_one_buffer():
    head = LinearHead(torch.randn(V, H))
    first, second, third = (head(torch.randn(rows, H)).data_ptr() for rows in (5, 5, 2))
    assert first == second == third


def test_a_plain_head_makes_no_graph():
    weight = torch.randn(V, H, requires_grad=True)
    logits = LinearHead(weight)(torch.randn(3, H, requires_grad=True))
    assert not logits.requires_grad


@pytest.mark.parametrize("gradient", [True, False])
def test_no_tokens(gradient):
    _, head, _ = sample()
    hidden, ids = torch.zeros(0, H, dtype=torch.float64, requires_grad=True), torch.zeros(0, dtype=torch.long)
    with torch.set_grad_enabled(gradient):
        got = chunked_stats(hidden, head, ids, chunk=4)
        assert got.entropy.shape == chunked_logprobs(hidden, head, ids, chunk=4).shape == (0,)
    if gradient:  # every parameter still gets a gradient, or DDP waits for it
        got.logprob.sum().backward()
        assert all(p.grad is not None for p in head.parameters() if p.requires_grad)


@pytest.mark.parametrize("ids", [M + 1, M - 1])
@pytest.mark.parametrize("function", [chunked_stats, chunked_logprobs])
@pytest.mark.parametrize("gradient", [True, False])
def test_ids_that_do_not_match_are_refused(ids, function, gradient):
    hidden, head, _ = sample()
    with torch.set_grad_enabled(gradient), pytest.raises(ValueError, match="do not match"):
        function(hidden, head, torch.zeros(ids, dtype=torch.long), chunk=4)


def test_chunks_cover_every_token_once():
    for tokens in (1, 5, 6, 7, 12):
        covered = [t for rows in chunks(tokens, 6) for t in range(tokens)[rows]]
        assert covered == list(range(tokens))
        assert all(rows.stop <= tokens for rows in chunks(tokens, 6))


@pytest.mark.parametrize(
    ("vocabulary", "rows"), [(151_936, 128), (262_144, 64), (32_000, 768), (2_048, 1024), (2, 1024)]
)
def test_chunk_rows(vocabulary, rows):
    assert chunk_rows(vocabulary) == rows
    assert chunk_rows(vocabulary) * vocabulary * 4 <= CHUNK_BYTES


def test_chunk_rows_of_an_enormous_vocabulary():
    assert chunk_rows(10**7) == 16
    assert chunk_rows(400_000) == 62
