import pytest
import torch

from rlif_lightning.functional.entropy import adapted_coefficient, top_entropy_mask
from rlif_lightning.functional.token_stats import token_stats
from tests.functional.loss_calls import loss_denominator, policy_loss


def test_top_entropy_by_hand():
    entropy = torch.tensor([[0.1, 2.0, 0.5, 9.0], [1.0, 0.2, 8.0, torch.nan], [0.3, 7.0, 7.0, 7.0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    # six tokens 0.1 0.2 0.3 0.5 1.0 2.0; their 0.6 quantile is the fourth, their 0.5 quantile 0.4
    for fraction, kept in ((0.4, {0.5, 1.0, 2.0}), (0.5, {0.5, 1.0, 2.0}), (0.3, {1.0, 2.0}), (1e-9, {2.0})):
        got = top_entropy_mask(entropy, mask, fraction)
        assert {round(x, 6) for x in entropy[got].tolist()} == kept, fraction
        assert not (got & ~mask).any()
    assert torch.equal(top_entropy_mask(entropy, mask, 1.0), mask)


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.37, 0.5, 0.8, 0.999])
@pytest.mark.parametrize("n", [1, 2, 3, 10, 101])
def test_top_entropy_is_the_quantile(fraction, n):
    g = torch.Generator().manual_seed(n)
    entropy, mask = torch.rand(n, 7, generator=g).double(), torch.rand(n, 7, generator=g) < 0.6
    mask[0, 0] = True
    threshold = torch.quantile(entropy[mask], 1 - fraction)
    assert torch.equal(top_entropy_mask(entropy, mask, fraction), mask & (entropy >= threshold))


def test_top_entropy_over_processes():
    torch.manual_seed(0)
    entropy, mask = torch.rand(6, 9), torch.rand(6, 9) < 0.7
    mask[4:] = False  # the third process has nothing to choose from
    want = top_entropy_mask(entropy, mask, 0.3)
    parts = [
        top_entropy_mask(e, m, 0.3, lambda own: entropy[mask])
        for e, m in zip(entropy.split(2), mask.split(2), strict=True)
    ]
    assert torch.equal(torch.cat(parts), want)
    alone = [top_entropy_mask(e, m, 0.3) for e, m in zip(entropy.split(2), mask.split(2), strict=True)]
    assert not torch.equal(torch.cat(alone), want)


def test_top_entropy_of_equal_and_of_no_tokens():
    entropy, mask = torch.ones(2, 3), torch.tensor([[True, True, False], [True, False, False]])
    assert torch.equal(top_entropy_mask(entropy, mask, 0.2), mask)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert torch.equal(top_entropy_mask(entropy, nothing, 0.2), nothing)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, float("nan")])
def test_top_entropy_refuses(fraction):
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="fraction"):
        top_entropy_mask(torch.ones(2, 3), mask, fraction)
    with pytest.raises(ValueError, match="shape"):
        top_entropy_mask(torch.ones(2, 1), mask, 0.5)


def test_the_coefficient_follows_the_target():
    c, seen = 0.0, []
    for entropy in (0.1, 0.2, 0.29, 0.5, 0.5, 0.5, 0.3, 0.1):
        c = adapted_coefficient(c, entropy, target=0.3)
        seen.append(c)
    assert seen == pytest.approx([0.005, 0.01, 0.015, 0.01, 0.005, 0.0, 0.0, 0.005])


class TestBonus:
    @staticmethod
    def batch():
        g = torch.Generator().manual_seed(1)
        logits = torch.randn(3, 4, 6, generator=g).double().requires_grad_()
        ids, mask = (
            torch.randint(6, (3, 4), generator=g),
            torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]]).bool(),
        )
        return logits, ids, mask

    @pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo", "gspo", "cispo"])
    def test_it_is_the_mean_entropy_with_the_weights_of_the_loss(self, loss):
        logits, ids, mask = self.batch()
        logprob, entropy = token_stats(logits, ids)[:2]
        out = policy_loss(
            logprob,
            torch.zeros(3),
            mask,
            loss_denominator(mask, loss, 8),
            entropy=entropy,
            entropy_coefficient=0.1,
            loss=loss,
        )
        h = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
        by_sequence = (h[0].mean() + h[1, 0] + h[2, :2].mean()) / 3
        total = h[mask].sum()
        mean = {"grpo": by_sequence, "gspo": by_sequence, "dr_grpo": total / 24}.get(loss, total / 7)
        assert out.loss.item() == pytest.approx(-0.1 * mean.item())
        assert out.entropy.item() == pytest.approx(total.item())
        got, want = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (out.loss, -0.1 * mean))
        torch.testing.assert_close(got, want)

    def test_a_step_raises_the_entropy(self):
        logits, ids, mask = self.batch()
        logprob, entropy = token_stats(logits, ids)[:2]
        settings = {"entropy": entropy, "entropy_coefficient": 1.0}
        (grad,) = torch.autograd.grad(policy_loss(logprob, torch.zeros(3), mask, 3.0, **settings).loss, logits)
        after = token_stats(logits - 0.1 * grad, ids).entropy
        assert (after > entropy)[mask].all()
        assert torch.equal(after[~mask], entropy[~mask])

    def test_without_a_coefficient_it_is_only_reported(self):
        logits, ids, mask = self.batch()
        logprob, entropy = token_stats(logits, ids)[:2]
        plain = policy_loss(logprob, torch.ones(3), mask, 3.0)
        reported = policy_loss(logprob, torch.ones(3), mask, 3.0, entropy=entropy)
        assert torch.equal(plain.loss, reported.loss)
        assert plain.entropy == 0 < reported.entropy
        (grad,) = torch.autograd.grad(reported.loss, entropy, allow_unused=True, retain_graph=True)
        assert grad is None


class TestSurrogateMask:
    @pytest.mark.parametrize("loss", ["grpo", "dapo", "bnpo", "dr_grpo", "gspo", "cispo"])
    def test_others_keep_their_kl_and_the_denominator(self, loss):
        """Each token's gradient is either that without the mask, or that without an advantage."""
        g = torch.Generator().manual_seed(3)
        logprob = (-torch.rand(3, 5, generator=g) - 0.1).double().requires_grad_()
        mask, learns = torch.ones(3, 5).bool(), torch.rand(3, 5, generator=g) > 0.5
        learns[2] = False

        def grad(advantages, surrogate_mask=None):
            settings = {"reference_logprob": logprob.detach() - 0.3, "kl_coefficient": 0.2, "loss": loss}
            d = loss_denominator(mask, loss, 7)
            out = policy_loss(logprob, advantages, mask, d, surrogate_mask=surrogate_mask, **settings)
            return torch.autograd.grad(out.loss, logprob)[0]

        a = torch.tensor([1.0, -2.0, 0.7]).double()
        torch.testing.assert_close(grad(a, learns), grad(a).where(learns, grad(0 * a)), rtol=1e-12, atol=0)
        assert torch.equal(grad(a, mask), grad(a))
        assert not torch.equal(grad(a, learns), grad(a))
