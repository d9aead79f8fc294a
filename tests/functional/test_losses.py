import math

import pytest
import torch
from torch.autograd import gradcheck

from rlif_lightning.functional.loss_records import LossSettings
from rlif_lightning.functional.losses import kl_estimate
from tests.functional.loss_calls import loss_denominator, policy_loss

LOSSES = ["grpo", "dapo", "bnpo", "dr_grpo", "gspo", "cispo"]
BY_SEQUENCE = ("grpo", "gspo")
LENGTHS = [5, 1, 3, 0, 7, 2, 7, 4]  # of the window's rows; one is masked out altogether
N, T, MAX_TOKENS = len(LENGTHS), 9, 12  # wider than the longest row, and narrower than the sampler allows
SETTINGS = {"clip_low": 0.1, "clip_high": 0.3, "kl_coefficient": 0.7, "entropy_coefficient": 0.4}
PER_TOKEN = ("logprob", "old_logprob", "reference_logprob", "entropy", "importance")


def window(seed=0):
    """Inputs of policy_loss for a whole window, off policy enough to be clipped on both sides."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    logprob = -normal(N, T).abs() - 0.1
    return {
        "logprob": logprob,
        "advantages": normal(N),
        "mask": torch.arange(T) < torch.tensor(LENGTHS)[:, None],
        "old_logprob": logprob + normal(N, T) * 0.3,
        "reference_logprob": logprob + normal(N, T) * 0.5,
        "entropy": normal(N, T).abs(),
        "surrogate_mask": normal(N, T) > -0.5,
        "importance": (normal(N, T) * 0.4).exp().clamp(max=1.5),
    }


KL = {"k2": lambda d: d * d / 2, "k3": lambda d: d.exp() - d - 1}


def naive(w, loss, clip_low, clip_high, kl_coefficient, kl_estimator="k3", entropy_coefficient=0.0):
    """Loops over single numbers, written from the papers: loss, ratio, clipped, kl, entropy, tokens."""
    total = ratios = kls = entropies = 0.0
    clipped = tokens = rows = 0
    low, high = 1 - clip_low, 1 + clip_high
    for i in range(N):
        length = int(w["mask"][i].sum())
        rows += length > 0
        tokens += length
        a = float(w["advantages"][i])
        logs = [float(w["logprob"][i, t].detach() - w["old_logprob"][i, t]) for t in range(length)]
        for t in range(length):
            lp, learns = w["logprob"][i, t], bool(w["surrogate_mask"][i, t])
            r = math.exp(sum(logs) / length) if loss == "gspo" else math.exp(logs[t])
            moving = r * (1 + lp - lp.detach())  # r, and its gradient r d log pi
            if loss == "cispo":
                surrogate, cut = min(r, high) * a * lp, r > high
            else:
                inside = low if r < low else high if r > high else r
                cut = r * a > inside * a
                surrogate = inside * a if cut else moving * a
            surrogate = surrogate * float(w["importance"][i, t])
            kl = KL[kl_estimator](float(w["reference_logprob"][i, t]) - lp)
            term = kl_coefficient * kl - entropy_coefficient * w["entropy"][i, t] - (surrogate if learns else 0)
            total = total + (term / length if loss in BY_SEQUENCE else term)
            ratios, kls, entropies = ratios + r, kls + kl.detach(), entropies + w["entropy"][i, t].detach()
            clipped += cut and learns
    denominator = rows if loss in BY_SEQUENCE else N * MAX_TOKENS if loss == "dr_grpo" else tokens
    return total / denominator, ratios, clipped, kls, entropies, tokens


def take(w, rows, width=None):
    """Some rows of a window, cut to a width."""
    return {k: x[rows] if x.ndim == 1 else x[rows, :width] for k, x in w.items()}


def values(out):
    """A PolicyLoss as one tensor [6] without gradient."""
    return torch.stack(out).detach()


def gradient(w, denominator, loss, **settings):
    """The gradient with respect to logprob, and the whole answer."""
    logprob = w["logprob"].detach().clone().requires_grad_()
    w = {**w, "logprob": logprob, "denominator": denominator, "loss": loss}
    out = policy_loss(**w, **settings)
    return torch.autograd.grad(out.loss, logprob)[0], out


@pytest.mark.parametrize("kl_estimator", ["k2", "k3"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("seed", [0, 1])
def test_against_naive_loops(loss, seed, kl_estimator):
    """Values and gradients, in the log-probabilities and in the entropies."""
    w = window(seed)
    settings = {**SETTINGS, "kl_estimator": kl_estimator, "clip_low": 0.05, "clip_high": 0.1}
    for key in ("logprob", "entropy"):
        w[key].requires_grad_()
    got = policy_loss(**w, denominator=loss_denominator(w["mask"], loss, MAX_TOKENS), loss=loss, **settings)
    want = naive(w, loss, **settings)
    wanted = [x.item() if torch.is_tensor(x) else x for x in want]
    assert values(got).tolist() == pytest.approx(wanted, rel=1e-12)
    assert 0 < want[2] < want[5]  # some tokens are clipped, not all
    mine, theirs = (torch.autograd.grad(x, (w["logprob"], w["entropy"])) for x in (got.loss, want[0]))
    for x, y in zip(mine, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-15)
        assert y.abs().max() > 1e-3


def test_by_hand():
    # Row 0, A = 1, two tokens: r = 1.5, clipped to 1.25: -1.25; r = 0.5 (not cut for A > 0): -0.5.
    # Row 1, A = -2, one token: r = 0.5, below 0.9: -min(-1, -1.8) = 1.8.
    # k3 with reference = 2 pi for token one (d = log 2: 2 - 0.693147 - 1 = 0.306853), equal elsewhere.
    p = torch.tensor([[0.6, 0.2], [0.3, 1.0]]).double()
    old = torch.tensor([[0.4, 0.4], [0.6, 1.0]]).double()
    reference = torch.tensor([[1.2, 0.2], [0.3, 1.0]]).double()
    mask = torch.tensor([[True, True], [True, False]])
    inputs = (p.log(), torch.tensor([1.0, -2.0]), mask)
    kwargs = {"old_logprob": old.log(), "reference_logprob": reference.log()}
    kwargs |= {"clip_low": 0.1, "clip_high": 0.25, "kl_coefficient": 1.0}
    # sequence means (-1.25 - 0.5 + 0.306853) / 2 = -0.721574 and 1.8; their mean 0.539213
    out = policy_loss(*inputs, 2.0, **kwargs)
    assert float(out.loss) == pytest.approx(0.5392132, abs=1e-6)
    assert [float(x) for x in out[1:]] == pytest.approx([1.5 + 0.5 + 0.5, 2, 0.3068528, 0, 3], abs=1e-6)
    # tokens: (-1.25 - 0.5 + 1.8 + 0.306853) / 3 = 0.118951; a constant length of 4: 0.356853 / 8 = 0.044607
    out = policy_loss(*inputs, 3.0, loss="dapo", **kwargs)
    assert float(out.loss) == pytest.approx(0.1189509, abs=1e-6)
    out = policy_loss(*inputs, 8.0, loss="dr_grpo", **kwargs)
    assert float(out.loss) == pytest.approx(0.0446066, abs=1e-6)


def test_gspo_by_hand():
    # Row 0, A = 1: ratios 4 and 1, so s = exp((log 4 + log 1) / 2) = 2, clipped to 1.5: -1.5, no gradient.
    # Row 1, A = -2: ratios 1/2 and 2, s = 1: a token's clip would cut both ends, the sequence's none.
    # Row 2, A = 1: its one token has ratio 1/2, s = 0.5, not cut for A > 0: -0.5.
    old = torch.tensor([[0.1, 0.3], [0.6, 0.2], [0.8, 0.1]]).double()
    p = (old * torch.tensor([[4.0, 1.0], [0.5, 2.0], [0.5, 9.0]])).log().requires_grad_()
    mask = torch.tensor([[True, True], [True, True], [True, False]])
    advantages = torch.tensor([1.0, -2.0, 1.0]).double()
    settings = {"old_logprob": old.log(), "loss": "gspo", "clip_low": 0.2, "clip_high": 0.5}
    out = policy_loss(p, advantages, mask, loss_denominator(mask, "gspo", 9), **settings)
    assert out.loss.item() == pytest.approx((-1.5 + 2.0 - 0.5) / 3)
    # 2 tokens of ratio 2, 2 of 1, 1 of 0.5; both tokens of row 0 are clipped
    assert [float(x) for x in out[1:]] == pytest.approx([6.5, 2, 0, 0, 5])
    (grad,) = torch.autograd.grad(out.loss, p)
    # -A s / tokens of the row / 3 rows
    want = torch.tensor([[0, 0], [2 / 2 / 3, 2 / 2 / 3], [-0.5 / 3, 0]]).double()
    torch.testing.assert_close(grad, want)
    # A token that does not learn leaves its own gradient out, and the other's whole.
    learns = torch.tensor([[True, True], [False, True], [True, True]])
    out = policy_loss(p, advantages, mask, 3.0, surrogate_mask=learns, **settings)
    want[1, 0] = 0
    torch.testing.assert_close(torch.autograd.grad(out.loss, p)[0], want)


def test_gspo_has_the_gradient_of_the_sequence_ratio_itself():
    """The token form against s = exp(mean log ratio), differentiated as it stands."""
    w = window()
    for key in ("entropy", "surrogate_mask", "reference_logprob", "importance"):
        del w[key]
    grad, _ = gradient(w, 7.0, "gspo", clip_low=0.05, clip_high=0.1)
    lp, n = w["logprob"].detach().requires_grad_(), w["mask"].sum(1).clamp(min=1)
    s = (((lp - w["old_logprob"]) * w["mask"]).sum(1) / n).exp()
    direct = -torch.minimum(s * w["advantages"], s.clamp(0.95, 1.1) * w["advantages"])
    want = torch.autograd.grad(direct[w["mask"].any(1)].sum() / 7, lp)[0]
    torch.testing.assert_close(grad, want, rtol=1e-12, atol=1e-15)
    rows = want[w["mask"].any(1)].abs().sum(1)
    assert 0 < (rows == 0).sum() < 7  # some sequences are clipped, not all


def test_cispo_by_hand():
    # Cap 1.5. Row 0, A = 1: ratio 4, weight 1.5: -1.5 log 0.4 = 1.374436; ratio 0.1, no lower bound:
    # -0.1 log 0.05 = 0.299573. Row 1, A = -2: ratio 2, weight 1.5: 3 log 0.4 = -2.748872. Five tokens in the window.
    old = torch.tensor([[0.1, 0.5], [0.2, 0.1]]).double()
    p = torch.tensor([[0.4, 0.05], [0.4, 0.7]]).double().log().requires_grad_()
    mask = torch.tensor([[True, True], [True, False]])
    settings = {"old_logprob": old.log(), "loss": "cispo", "clip_low": 0.2, "clip_high": 0.5}
    out = policy_loss(p, torch.tensor([1.0, -2.0]).double(), mask, 5.0, **settings)
    assert out.loss.item() == pytest.approx((1.374436 + 0.299573 - 2.748872) / 5, abs=1e-6)
    assert [float(x) for x in out[1:]] == pytest.approx([6.1, 2, 0, 0, 3])
    # every token keeps the gradient -weight A / 5
    want = torch.tensor([[-0.3, -0.02], [0.6, 0.0]]).double()
    torch.testing.assert_close(torch.autograd.grad(out.loss, p)[0], want)


@pytest.mark.parametrize("loss", ["grpo", "dapo", "cispo"])
def test_importance_by_hand(loss):
    """Two rows on policy, with weights of 2, 1/2 and 1 on the surrogate; the KL term has none."""
    logprob = torch.tensor([[-1.0, -2.0], [-0.5, 9.0]], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([[-1.0, -1.0], [-0.5, 9.0]], dtype=torch.float64)
    weights = torch.tensor([[2.0, 0.5], [1.0, torch.nan]], dtype=torch.float64)
    mask = torch.tensor([[True, True], [True, False]])
    out = policy_loss(
        logprob,
        torch.tensor([1.0, -3.0]),
        mask,
        loss_denominator(mask, loss, 2),
        reference_logprob=reference,
        importance=weights,
        loss=loss,
        kl_coefficient=0.1,
    )
    kl = math.e - 2  # exp(1) - 1 - 1 of the second token, whose gradient is 1 - exp(1)
    if loss == "grpo":  # means of the rows, then of the two rows
        value = ((-2 - 0.5 + 0.1 * kl) / 2 + 3) / 2
        gradient = [[-0.5, -0.125 + 0.1 * (1 - math.e) / 4], [1.5, 0.0]]
    else:
        value = (-2 - 0.5 + 0.1 * kl + 3) / 3
        gradient = [[-2 / 3, (-0.5 + 0.1 * (1 - math.e)) / 3], [1.0, 0.0]]
    if loss == "cispo":  # its value holds the log-probability
        value = (2 * 1 + 0.5 * 2 + 0.1 * kl - 3 * 0.5) / 3
    assert out.loss.item() == pytest.approx(value, rel=1e-12)
    out.loss.backward()
    torch.testing.assert_close(logprob.grad, torch.tensor(gradient, dtype=torch.float64), rtol=1e-12, atol=0)


def test_denominators():
    mask = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    # 8 rows, one without a token; 29 tokens; 8 rows of at most 12 tokens
    got = {name: loss_denominator(mask, name, MAX_TOKENS) for name in LOSSES}
    want = {"grpo": 7.0, "dapo": 29.0, "bnpo": 29.0, "dr_grpo": 96.0, "gspo": 7.0, "cispo": 29.0}
    assert {k: v.item() for k, v in got.items()} == want
    assert all(v.shape == () and v.dtype == torch.float32 for v in got.values())


def test_dapo_and_bnpo_are_one_thing():
    """They differ by whose tokens are counted; with the window's denominator both count the window's."""
    w = window()
    dapo, bnpo = (gradient(w, loss_denominator(w["mask"], k, 1), k, **SETTINGS) for k in ("dapo", "bnpo"))
    assert torch.equal(dapo[0], bnpo[0])
    assert dapo[1] == bnpo[1]


class TestSlices:
    """The gradient of a window does not depend on how it is cut."""

    CUTS = (
        [[*range(N)]],
        [[0, 1, 2, 3], [4, 5, 6, 7]],
        [[i] for i in range(N)],
        [[0], [1, 2], [3, 4, 5, 6, 7]],
        [[6, 2], [7, 0, 5], [3], [1, 4]],
    )

    @staticmethod
    def slices(w, cut):
        """Slices trimmed to their longest row, as a rollout trims them (an empty one keeps a column)."""
        return [take(w, rows, max(1, *(LENGTHS[i] for i in rows), 0)) for rows in cut]

    @staticmethod
    def parameters():
        """Weights and features [N, T, 4] of a policy whose log-probs are features @ weights."""
        g = torch.Generator().manual_seed(5)
        x = torch.randn(N, T, 4, generator=g, dtype=torch.float64)
        return torch.randn(4, generator=g, dtype=torch.float64), x

    def backward(self, w, cut, denominator, loss, factor=1.0, own_denominator=False):
        """The gradient summed over the slices of one window, in the policy's weights."""
        theta, x = self.parameters()
        theta.requires_grad_()
        for part, rows in zip(self.slices(w, cut), cut, strict=True):
            part["logprob"] = x[rows, : part["mask"].shape[1]] @ theta
            part["entropy"] = part["logprob"].square() / 9
            if own_denominator:
                denominator = loss_denominator(part["mask"], loss, MAX_TOKENS).clamp(min=1)
            out = policy_loss(**part, denominator=denominator, loss=loss, **SETTINGS)
            (out.loss * factor).backward()
        return theta.grad

    @staticmethod
    def near(seed=0):
        """A window whose old and reference log-probs are near those of the parameters above."""
        w = window(seed)
        theta, x = TestSlices.parameters()
        shift = x @ theta - w["logprob"]
        return {**w, **{k: w[k] + shift for k in ("old_logprob", "reference_logprob")}}

    @pytest.mark.parametrize("loss", LOSSES)
    @pytest.mark.parametrize("cut", CUTS, ids=lambda c: f"M={len(c)}")
    def test_any_cut(self, cut, loss):
        w = self.near()
        denominator = sum(loss_denominator(s["mask"], loss, MAX_TOKENS) for s in self.slices(w, cut))
        whole = loss_denominator(w["mask"], loss, MAX_TOKENS)
        assert denominator == whole  # trimming and cutting leave D alone
        got = self.backward(w, cut, denominator, loss)
        want = self.backward(w, self.CUTS[0], whole, loss)
        assert want.abs().max() > 1e-3
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)

    @pytest.mark.parametrize("loss", LOSSES)
    def test_logged_sums_add_up(self, loss):
        w = window()
        whole = policy_loss(**w, denominator=29.0, loss=loss, **SETTINGS)
        for cut in self.CUTS:
            parts = [policy_loss(**s, denominator=29.0, loss=loss, **SETTINGS) for s in self.slices(w, cut)]
            torch.testing.assert_close(torch.stack([values(p) for p in parts]).sum(0), values(whole))

    @pytest.mark.parametrize("loss", LOSSES)
    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_two_ranks(self, loss, accumulate):
        """Loss times accumulate and world size; the trainer divides by accumulate and averages over ranks."""
        w, world = self.near(), 2
        whole = self.backward(w, self.CUTS[0], loss_denominator(w["mask"], loss, MAX_TOKENS), loss)
        ranks = [[0, 1, 2, 3], [4, 5, 6, 7]]  # 9 tokens against 20
        denominator = sum(loss_denominator(w["mask"][r], loss, MAX_TOKENS) for r in ranks)
        grads = []
        for rows in ranks:
            cut = [rows] if accumulate == 1 else [rows[:1], rows[1:]]
            grads.append(self.backward(w, cut, denominator, loss, factor=accumulate * world / accumulate))
        torch.testing.assert_close(torch.stack(grads).mean(0), whole, rtol=1e-12, atol=1e-14)

    @pytest.mark.parametrize("loss", ["grpo", "dapo", "bnpo", "gspo", "cispo"])
    def test_a_denominator_per_slice_would_depend_on_the_cut(self, loss):
        """The control of this class: the usual mistake gives another gradient, so those tests can fail."""
        w, cut = self.near(), self.CUTS[3]
        whole = self.backward(w, self.CUTS[0], loss_denominator(w["mask"], loss, MAX_TOKENS), loss)
        per_slice = self.backward(w, cut, None, loss, factor=1 / len(cut), own_denominator=True)
        assert (per_slice - whole).abs().max() > 1e-2


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("on_policy", [True, False])
def test_padding_may_hold_anything(loss, on_policy):
    w = window()
    if on_policy:
        w["old_logprob"] = None
    present = {k: x for k, x in w.items() if x is not None}
    denominator = loss_denominator(w["mask"], loss, MAX_TOKENS)
    clean, want = gradient(present, denominator, loss, **SETTINGS)
    garbage = torch.tensor([torch.nan, torch.inf, -torch.inf, -1e4, 1e4]).double()
    for shift in range(5):
        dirty = {"advantages": w["advantages"].clone()}
        dirty["advantages"][3] = torch.nan  # of the row without a token
        dirty["surrogate_mask"] = torch.cat([w["surrogate_mask"], w["surrogate_mask"][:, :5]], 1)
        dirty["mask"] = torch.cat([w["mask"], torch.zeros(N, 5, dtype=torch.bool)], 1)
        for i, key in enumerate(PER_TOKEN):
            if key in present:
                wide = torch.cat([w[key], w[key][:, :5]], 1)
                noise = garbage.roll(shift + 2 * i).repeat(3)[: T + 5].expand(N, -1)
                dirty[key] = wide.where(dirty["mask"], noise)
        grad, got = gradient(dirty, denominator, loss, **SETTINGS)
        torch.testing.assert_close(values(got), values(want), rtol=1e-13, atol=0)
        torch.testing.assert_close(grad[:, :T], clean, rtol=1e-13, atol=1e-15)
        assert (grad[~dirty["mask"]] == 0).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_on_policy_is_reinforce(loss):
    w = window()
    del w["old_logprob"], w["reference_logprob"], w["surrogate_mask"]
    denominator = loss_denominator(w["mask"], loss, MAX_TOKENS)
    grad, out = gradient(w, denominator, loss)
    assert out.ratio == out.tokens == 29  # each ratio is exactly 1
    assert out.clipped == 0
    assert out.kl == 0
    share = w["mask"].double()
    if loss in BY_SEQUENCE:
        share = share / w["mask"].sum(1, keepdim=True).clamp(min=1)
    want = -w["advantages"][:, None] * w["importance"] * share / denominator
    torch.testing.assert_close(grad, want, rtol=1e-13, atol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_positive_advantage_raises_the_logprob(loss):
    logits = torch.zeros(2, 1, 3, requires_grad=True)
    logprob = logits.log_softmax(-1)[:, :, 0]
    mask = torch.ones(2, 1, dtype=torch.bool)
    policy_loss(logprob, torch.tensor([1.0, -1.0]), mask, 2.0, loss=loss).loss.backward()
    after = (logits - 0.1 * logits.grad).log_softmax(-1)[:, 0, 0]
    assert after[0] > logprob[0, 0]
    assert after[1] < logprob[1, 0]


def test_kl_pulls_to_the_reference():
    logprob = torch.tensor([[-1.0, -2.0, -3.0]], requires_grad=True)
    reference = torch.tensor([[-2.0, -1.0, -3.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    policy_loss(logprob, torch.zeros(1), mask, 1.0, reference_logprob=reference, kl_coefficient=0.1).loss.backward()
    high, low, equal = logprob.grad[0].tolist()
    assert high > 0 > low  # descent lowers what stands above the reference, and raises what stands below
    assert equal == 0


@pytest.mark.parametrize(
    ("ratio", "advantage", "cut"),
    [
        (1.29, 1.0, True),
        (1.27, 1.0, False),
        (1.29, -1.0, False),
        (0.79, -1.0, True),
        (0.81, -1.0, False),
        (0.79, 1.0, False),
        (1.5, 0.0, False),
    ],
)
def test_clip_on_both_sides(ratio, advantage, cut):
    w = {
        "logprob": torch.full((1, 1), -1.0).double(),
        "advantages": torch.tensor([advantage]).double(),
        "mask": torch.ones(1, 1, dtype=torch.bool),
        "old_logprob": torch.full((1, 1), -1.0 - math.log(ratio)).double(),
    }
    grad, out = gradient(w, 1.0, "grpo", clip_low=0.2, clip_high=0.28)
    assert out.clipped == cut
    assert out.ratio.item() == pytest.approx(ratio)
    bound = (0.8 if ratio < 1 else 1.28) if cut else ratio
    assert out.loss.item() == pytest.approx(-bound * advantage)
    assert grad.item() == pytest.approx(0.0 if cut else -ratio * advantage)


@pytest.mark.parametrize("loss", ["grpo", "dapo", "bnpo", "dr_grpo", "gspo"])
def test_gradcheck(loss):
    """Not for cispo, nor for gspo whose tokens differ: their gradient is by design not that of their value."""
    w = window()
    if loss == "gspo":
        del w["surrogate_mask"], w["importance"]
    for key in ("logprob", "entropy"):
        w[key].requires_grad_()

    def value(logprob, entropy):
        return policy_loss(
            **{**w, "logprob": logprob, "entropy": entropy}, denominator=7.0, loss=loss, **SETTINGS
        ).loss

    assert gradcheck(value, (w["logprob"], w["entropy"]))


def test_gradient_in_logprob_alone():
    w = window()
    for key in ("logprob", "advantages", "old_logprob", "reference_logprob"):
        w[key].requires_grad_()
    out = policy_loss(**w, denominator=7.0, **SETTINGS)
    assert [x.requires_grad for x in out] == [True, False, False, False, False, False]
    out.loss.backward()
    assert w["logprob"].grad is not None
    assert all(w[key].grad is None for key in ("advantages", "old_logprob", "reference_logprob"))


class TestK3:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_never_negative_and_zero_only_where_equal(self, dtype):
        """exp(d) - d - 1 in fp32 is negative for one small d in two."""
        logprob = -torch.linspace(0.01, 20, 4001, dtype=dtype)
        for size in (0.0, 1e-6, 1e-4, 1e-2, 1.0, 5.0):
            for reference in (logprob + size, logprob - size):
                k3 = kl_estimate(logprob, reference)
                assert (k3 >= 0).all()
                if size == 0:
                    assert (k3 == 0).all()
                if size >= 1e-2:
                    assert (k3 > 0).all()

    def test_a_small_difference_keeps_its_digits(self):
        # d = 1e-3: d^2/2 + d^3/6 = 5.0016671e-07
        k3 = kl_estimate(torch.zeros(1), torch.tensor([1e-3]))
        assert k3.item() == pytest.approx(5.0016671e-07, rel=1e-3)

    def test_expectation_is_the_divergence(self):
        """Under pi, E[k3] = KL(pi || reference): the direction of the penalty."""
        p, q = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.2, 0.3, 0.5]).double()
        assert (p * kl_estimate(p.log(), q.log())).sum().item() == pytest.approx((p * (p / q).log()).sum().item())

    def test_without_a_coefficient_it_is_only_reported(self):
        w = window()
        alone, out = gradient({k: x for k, x in w.items() if k != "reference_logprob"}, 7.0, "grpo")
        grad, reported = gradient(w, 7.0, "grpo")
        assert torch.equal(grad, alone)
        assert reported.loss == out.loss
        assert reported.kl.item() == pytest.approx(naive(w, "grpo", 0.2, 0.2, 0.0)[3])
        assert out.kl == 0
        w["reference_logprob"][0, 0] = 1000.0  # a k3 of inf is reported, and 0 * inf kept out of the loss
        grad, reported = gradient(w, 7.0, "grpo")
        assert torch.equal(grad, alone)
        assert reported.loss == out.loss
        assert reported.kl == torch.inf

    @pytest.mark.parametrize("estimator", ["k2", "k3"])
    def test_mean_gradient_under_the_policy(self, estimator):
        """What a penalty does is its mean gradient: that of KL(pi || ref), that of KL(ref || pi)."""
        z = torch.tensor([0.5, -0.3, 1.0]).double().requires_grad_()
        q = torch.tensor([0.2, 0.3, 0.5]).double()
        logp = z.log_softmax(-1)
        p = logp.exp()
        got = torch.autograd.grad((p.detach() * kl_estimate(logp, q.log(), estimator)).sum(), z, retain_graph=True)[0]
        meant = {"k2": (p * (p / q).log()).sum(), "k3": (q * (q / p).log()).sum()}[estimator]
        torch.testing.assert_close(got, torch.autograd.grad(meant, z)[0], rtol=1e-12, atol=1e-15)

    def test_a_coefficient_needs_a_reference(self):
        w = window()
        del w["reference_logprob"]
        with pytest.raises(ValueError, match=r"kl_coefficient 0\.1"):
            policy_loss(**w, denominator=1.0, kl_coefficient=0.1)
        del w["entropy"]
        with pytest.raises(ValueError, match=r"entropy_coefficient 0\.2, no entropy"):
            policy_loss(**w, denominator=1.0, entropy_coefficient=0.2)


def test_dtypes():
    w = window()
    low = {k: x.bfloat16() if x.is_floating_point() else x for k, x in w.items()}
    out = policy_loss(**low, denominator=7.0, **SETTINGS)
    assert all(x.dtype == torch.float32 for x in out)
    raised = {k: x.double() if x.is_floating_point() else x for k, x in low.items()}
    want = policy_loss(**raised, denominator=7.0, **SETTINGS)
    assert all(x.dtype == torch.float64 for x in want)
    torch.testing.assert_close(values(out), values(want), check_dtype=False)
    # a tensor denominator is a count in fp32 and must not lower the loss
    assert policy_loss(**w, denominator=torch.tensor(7.0)).loss.dtype == torch.float64


@pytest.mark.parametrize("loss", LOSSES)
def test_a_window_without_a_token_is_zero(loss):
    """0 / 0 would put nan into every weight; a truncated batch may mask out all its rows."""
    w = window()
    w["mask"] = torch.zeros_like(w["mask"])
    grad, out = gradient(w, loss_denominator(w["mask"], loss, MAX_TOKENS), loss, **SETTINGS)
    assert [x.item() for x in out] == [0] * 6
    assert (grad == 0).all()


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("advantages", (N, 1)),
        ("advantages", (1,)),
        ("mask", (1, T)),
        ("old_logprob", (N, 1)),
        ("reference_logprob", (N, T + 1)),
        ("entropy", (1, T)),
        ("surrogate_mask", (N, 1)),
        ("importance", (N, 1)),
    ],
)
def test_shapes_that_would_broadcast_are_refused(key, shape):
    w = window()
    wanted = list(w[key].shape)
    w[key] = torch.ones(shape, dtype=w[key].dtype)
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the text is compared below
        policy_loss(**w, denominator=1.0)
    assert str(error.value) == f"{key} has a wrong shape\n  got: {list(shape)}\n  expected: {wanted}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "token"}, "loss is unknown\n  got: 'token'\n  expected: one of grpo, dapo"),
        ({"kl_estimator": "k1"}, "kl_estimator is unknown\n  got: 'k1'\n  expected: one of k2, k3"),
        ({"clip_low": -0.1}, "clip_low is out of range\n  got: -0.1\n  expected: 0 or more"),
        ({"clip_high": -1}, "clip_high is out of range"),
        ({"kl_coefficient": -1e-9}, "kl_coefficient is out of range"),
        ({"entropy_coefficient": -1.0}, "entropy_coefficient is out of range"),
    ],
)
def test_settings_without_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LossSettings(**settings)


def test_a_flat_logprob_is_refused():
    mask = torch.ones(2, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"logprob has a wrong shape\n  got: \[2\]"):
        policy_loss(torch.zeros(2), torch.zeros(2), mask, 1.0)
