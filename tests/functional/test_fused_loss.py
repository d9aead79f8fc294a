"""The fused loss against full logits, the plain loss and autograd, in float64."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from rlif_lightning.functional.chunked import LinearHead, chunk_rows, chunked_logprobs
from rlif_lightning.functional.fused_loss import fused_loss
from rlif_lightning.functional.loss_records import LossSettings
from rlif_lightning.functional.token_stats import token_logprobs
from tests.functional.loss_calls import fused_policy_loss, loss_denominator, policy_loss

SEPARABLE = ["grpo", "dapo", "bnpo", "dr_grpo", "cispo"]
LENGTHS = [5, 1, 0, 7, 4]  # one row without tokens
N, T, H, V, MAX_TOKENS = len(LENGTHS), 8, 6, 31, 12
M = sum(LENGTHS)


def window(seed=0, dtype=torch.float64, spread=0.3):
    """Inputs for all rows; what stands outside the completion mask is nan or a bad id."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    completion_mask = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    w = {
        "hidden": normal(N, T, H),
        "weight": normal(V, H),
        "ids": torch.randint(V, (N, T), generator=g),
        "completion_mask": completion_mask,
        "advantages": normal(N),
        "mask": completion_mask & (normal(N, T) > -1.2),  # some tokens are scored and do not enter the loss
        "surrogate_mask": normal(N, T) > -0.5,
    }
    logprob = token_logprobs(w["hidden"] @ w["weight"].T, w["ids"])
    w["old_logprob"], w["reference_logprob"] = logprob + normal(N, T) * spread, logprob + normal(N, T) * spread
    w["importance"] = (normal(N, T) * 0.4).exp().clamp(max=1.5)
    outside = ~completion_mask
    w["hidden"][outside] = torch.nan
    w["ids"][outside] = -100
    w["old_logprob"][~w["mask"]] = torch.nan
    w["reference_logprob"][~w["mask"]] = torch.inf
    w["importance"][outside] = torch.nan
    return w


def plain(w, denominator, temperature=1.0, scale=1.0, **settings):
    """Full logits, the plain loss, autograd: the loss and the gradients of hidden states and weight."""
    w = dict(w)
    inside = w.pop("completion_mask")
    hidden = w.pop("hidden").masked_fill(~inside[..., None], 0).requires_grad_()
    weight = w.pop("weight").detach().requires_grad_()
    logprob = token_logprobs(scale * F.linear(hidden, weight), w.pop("ids").where(inside, 0), temperature)
    out = policy_loss(logprob, denominator=denominator, **w, **settings)
    return out, *torch.autograd.grad(out.loss, (hidden, weight))


def fused(w, denominator, **settings):
    w = {**w, "hidden": w["hidden"].detach().requires_grad_(), "weight": w["weight"].detach().requires_grad_()}
    out = fused_policy_loss(**w, denominator=denominator, **settings)
    return out, *torch.autograd.grad(out.loss, (w["hidden"], w["weight"]))


def check(got, want, rtol=1e-10):
    """All of the two answers; a gradient to a fraction of its largest entry."""
    for g, w in zip(got[0], want[0], strict=True):
        torch.testing.assert_close(g.detach().double(), w.detach().double(), rtol=rtol, atol=rtol)
    for g, w in zip(got[1:], want[1:], strict=True):
        assert w.abs().max() > 1e-3
        torch.testing.assert_close(g.double(), w.double(), rtol=0, atol=rtol * float(w.abs().max()))


def without(w, *keys):
    return {k: x for k, x in w.items() if k not in keys}


OPTIONAL = {
    "all": (),
    "on policy": ("old_logprob",),
    "no reference": ("reference_logprob",),
    "all tokens learn": ("surrogate_mask",),
    "no other engine": ("importance",),
    "bare": ("old_logprob", "reference_logprob", "surrogate_mask", "importance"),
}


@pytest.mark.parametrize("left_out", OPTIONAL.values(), ids=OPTIONAL)
@pytest.mark.parametrize("kl_estimator", ["k2", "k3"])
@pytest.mark.parametrize("loss", SEPARABLE)
def test_against_full_logits(loss, kl_estimator, left_out):
    w = without(window(), *left_out)
    settings = {"loss": loss, "clip_low": 0.1, "clip_high": 0.15, "kl_estimator": kl_estimator}
    settings |= {"kl_coefficient": 0.0 if "reference_logprob" in left_out else 0.7}
    denominator = loss_denominator(w["mask"], loss, MAX_TOKENS)
    want = plain(w, denominator, temperature=0.8, scale=0.6, **settings)
    if "old_logprob" not in left_out:
        assert 0 < want[0].clipped < want[0].tokens
    for chunk in (1, 3, M, None):
        check(fused(w, denominator, temperature=0.8, scale=0.6, chunk=chunk, **settings), want)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 1.7])
@pytest.mark.parametrize("scale", [1.0, 0.25, 2.0])
def test_temperature_and_scale(temperature, scale):
    w = without(window(), "old_logprob", "reference_logprob")
    want = plain(w, 3.0, temperature=temperature, scale=scale)
    check(fused(w, 3.0, temperature=temperature, scale=scale, chunk=4), want)


@pytest.mark.parametrize("loss", SEPARABLE)
def test_fp32_against_float64(loss):
    w = window(seed=1)
    settings = {"loss": loss, "kl_coefficient": 0.1, "temperature": 0.9}
    w32 = {k: x.float() if x.is_floating_point() else x for k, x in w.items()}
    got = fused(w32, 5.0, chunk=3, **settings)
    assert all(x.dtype == torch.float32 for x in [*got[0], *got[1:]])
    check(got, plain({k: x.double() if x.is_floating_point() else x for k, x in w32.items()}, 5.0, **settings), 1e-5)


def test_on_policy_is_reinforce():
    w = without(window(), "old_logprob", "reference_logprob", "surrogate_mask")
    got, dh, dw = fused(w, 4.0, loss="dapo", chunk=5)
    assert got.ratio == got.tokens == w["mask"].sum()
    assert got.clipped == 0
    hidden = w["hidden"].masked_fill(~w["completion_mask"][..., None], 0).requires_grad_()
    weight = w["weight"].requires_grad_()
    logprob = F.log_softmax(hidden @ weight.T, -1).gather(-1, w["ids"].clamp(min=0)[..., None])[..., 0]
    weights = w["importance"].masked_fill(~w["mask"], 0)
    reinforce = -(w["advantages"][:, None] * weights * logprob * w["mask"]).sum() / 4
    for g, want in zip((dh, dw), torch.autograd.grad(reinforce, (hidden, weight)), strict=True):
        torch.testing.assert_close(g, want)


def test_a_step_raises_the_probability_of_a_good_token():
    w = without(window(), "old_logprob", "reference_logprob", "surrogate_mask")
    w["advantages"] = torch.ones(N, dtype=torch.float64)
    inside = w["mask"]

    def mean_logprob(weight):
        hidden, ids = w["hidden"][inside], w["ids"][inside]
        return token_logprobs(hidden @ weight.T, ids).mean()

    _, _, dw = fused(w, 4.0, chunk=5)
    assert mean_logprob(w["weight"] - 0.01 * dw) > mean_logprob(w["weight"])


@pytest.mark.parametrize("autocast", [False, True])
def test_the_kl_of_equal_weights_is_exactly_0(autocast):
    """The reference is scored without gradient, in the same chunks."""
    torch.manual_seed(0)
    vocabulary, features, chunk = 3000, 96, 16
    hidden, weight = torch.randn(3, 17, features), torch.randn(vocabulary, features) * 0.3
    ids, mask = torch.randint(vocabulary, (3, 17)), torch.rand(3, 17) > 0.2
    for scale, temperature in [(1.0, 1.0), (0.3, 0.7)]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            with torch.no_grad():
                head, tokens = LinearHead(weight.clone(), scale), hidden[mask]
                flat = chunked_logprobs(tokens, head, ids[mask], temperature, chunk=chunk)
            reference = torch.zeros(mask.shape).masked_scatter(mask, flat)
            out = fused_policy_loss(
                hidden.clone().requires_grad_(),
                weight.clone().requires_grad_(),
                ids,
                mask,
                9.0,
                advantages=torch.zeros(3),
                mask=mask,
                temperature=temperature,
                scale=scale,
                chunk=chunk,
                old_logprob=reference,
                reference_logprob=reference,
                kl_coefficient=1.0,
                kl_estimator="k2",
            )
        assert out.kl == 0
        assert out.loss == 0
        assert out.ratio == out.tokens


def test_bf16_autocast_against_fp32():
    """Products of bf16: 8 bits of precision, so gradients within 2 % of their norm, and the loss within 1 %."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 40, 64), torch.randn(500, 64) * 0.2
    ids, mask = torch.randint(500, (4, 40)), torch.rand(4, 40) > 0.1
    w = {"hidden": hidden, "weight": weight, "ids": ids, "completion_mask": mask, "mask": mask}
    w["advantages"] = torch.tensor([1.0, -1.5, 0.7, 2.0])
    want = plain(w, 20.0)
    with torch.autocast("cpu", torch.bfloat16):
        got = fused(w, 20.0, chunk=13)
        naive = plain(w, 20.0)
    assert got[1].dtype == got[2].dtype == got[0].loss.dtype == torch.float32
    torch.testing.assert_close(got[0].loss, want[0].loss, rtol=0.01, atol=0.01)
    assert not torch.equal(got[1], want[1])  # bf16 it is
    for g, n, full in zip(got[1:], naive[1:], want[1:], strict=True):
        error, plain_error = (g - full).norm() / full.norm(), (n - full).norm() / full.norm()
        assert error < 0.02
        assert error < 1.5 * plain_error  # and no worse than autograd's under the same autocast


def test_float16_keeps_what_a_gradient_scaler_lifts():
    """Each token's share of the gradient is far below float16's smallest number, 6e-8; the loss is scaled up."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 40, 64).half(), (torch.randn(500, 64) * 0.02).half()
    ids, mask = torch.randint(500, (4, 40)), torch.rand(4, 40) > 0.1
    w = {"hidden": hidden, "weight": weight, "ids": ids, "completion_mask": mask, "mask": mask}
    w["advantages"] = torch.tensor([1.0, -1.5, 0.7, 2.0])
    want = plain({k: x.double() if x.is_floating_point() else x for k, x in w.items()}, 1e6)
    leaves = {"hidden": hidden.clone().requires_grad_(), "weight": weight.float().requires_grad_()}
    with torch.autocast("cpu", torch.float16):
        out = fused_policy_loss(**{**w, **leaves}, denominator=1e6, chunk=13)
    (out.loss * 2.0**20).backward()
    for leaf, full in zip(leaves.values(), want[1:], strict=True):
        assert (leaf.grad.double() / 2**20 - full).norm() < 0.01 * full.norm()


def test_float16_with_more_tokens_than_its_largest_number():
    """All 80,000 tokens are equally likely, so their exponentials sum to 80,000; float16 ends at 65,504."""
    hidden = torch.ones(2, 1, dtype=torch.float16, requires_grad=True)
    weight = torch.zeros(80_000, 1, dtype=torch.float16, requires_grad=True)
    total, logprob = fused_loss(
        hidden, weight, torch.tensor([3, 5]), lambda logprob, rows: logprob * 2.0**12, chunk=2
    )
    assert logprob.tolist() == pytest.approx([-math.log(80_000)] * 2)
    total.backward()
    assert weight.grad[[3, 5]].flatten().tolist() == pytest.approx([2**12] * 2, rel=2e-3)  # 1 - p
    assert weight.grad[4].item() == pytest.approx(-2 * 2**12 / 80_000, rel=2e-2)


def test_a_model_in_bf16_gets_its_gradients_in_bf16():
    w = {k: x.bfloat16() if k in ("hidden", "weight") else x for k, x in window().items()}
    got = fused(w, 5.0, chunk=3)
    assert got[1].dtype == got[2].dtype == torch.bfloat16
    assert got[0].loss.dtype == torch.float32
    want = plain({k: x.double() if x.is_floating_point() else x for k, x in w.items()}, 5.0)
    for g, full in zip(got[1:], want[1:], strict=True):
        assert (g.double() - full).norm() < 0.05 * full.norm()


def test_the_gradient_of_a_bf16_weight_is_summed_in_fp32():
    """1,000 chunks of one token each add the same to it: a sum in bf16 would stop growing at 256 of them."""
    hidden = torch.ones(1000, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.zeros(1000, dtype=torch.long)
    total, _ = fused_loss(hidden, weight, ids, lambda logprob, rows: logprob, chunk=1)
    total.backward()
    assert weight.grad.flatten().tolist() == [500, -500]  # 1 - p and -p, p = 1 / 2
    assert weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("trainable", ["hidden", "weight"])
def test_one_of_the_two_is_frozen(trainable):
    w = window()
    want = dict(zip(("hidden", "weight"), plain(w, 5.0)[1:], strict=True))[trainable]
    w[trainable].requires_grad_()
    with Recorder() as seen:
        out = fused_policy_loss(**w, denominator=5.0, chunk=3)
    out.loss.backward()
    torch.testing.assert_close(w[trainable].grad, want)
    frozen = "weight" if trainable == "hidden" else "hidden"
    assert w[frozen].grad is None
    # One product for the logits and one for the gradient that is wanted, and not the other.
    assert seen.count("addmm") == (trainable == "weight") * -(-M // 3)
    assert seen.count("mm") == (1 + (trainable == "hidden")) * -(-M // 3)


def test_values_alone_without_gradient():
    w = window()
    want = fused(w, 5.0, chunk=3)[0]
    w["hidden"].requires_grad_()
    w["weight"].requires_grad_()
    with torch.no_grad(), Recorder() as seen:
        got = fused_policy_loss(**w, denominator=5.0, chunk=3)
    assert not got.loss.requires_grad
    assert all(torch.equal(g, x) for g, x in zip(got, want, strict=True))
    assert seen.count("mm") == -(-M // 3)
    assert seen.count("addmm") == 0


def test_the_incoming_gradient_multiplies():
    w = window()
    _, dh, dw = fused(w, 5.0, chunk=3)
    w["hidden"].requires_grad_()
    w["weight"].requires_grad_()
    out = fused_policy_loss(**w, denominator=5.0, chunk=3)
    (out.loss * -3).backward()
    torch.testing.assert_close(w["hidden"].grad, -3 * dh)
    torch.testing.assert_close(w["weight"].grad, -3 * dw)


def test_slices_add_up_in_a_tied_weight():
    """Two slices of a window, of one weight that is also the embedding."""
    w = without(window(), "hidden")
    inputs = torch.randint(V, (N, T), generator=torch.Generator().manual_seed(1))
    gradients = []
    for slices in ([slice(0, N)], [slice(0, 2), slice(2, N)], None):
        weight = w["weight"].detach().clone().requires_grad_()
        for rows in slices or [slice(0, N)]:
            part = {k: x[rows] for k, x in without(w, "weight").items()}
            hidden = F.embedding(inputs[rows], weight).tanh()
            if slices:
                out = fused_policy_loss(hidden, weight, **part, denominator=5.0, chunk=4)
            else:
                inside = part.pop("completion_mask")
                logprob = token_logprobs(hidden @ weight.T, part.pop("ids").where(inside, 0))
                out = policy_loss(logprob, **part, denominator=5.0)
            out.loss.backward()
        gradients.append(weight.grad)
    torch.testing.assert_close(gradients[0], gradients[2])
    torch.testing.assert_close(gradients[1], gradients[2])


def test_a_second_backward_is_refused():
    w = window()
    w["hidden"].requires_grad_()
    out = fused_policy_loss(**w, denominator=5.0)
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        out.loss.backward()


def test_a_gradient_of_the_gradient_is_refused():
    w = window()
    w["hidden"].requires_grad_()
    out = fused_policy_loss(**w, denominator=5.0)
    (grad,) = torch.autograd.grad(out.loss**2, w["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("scored", [True, False])
def test_a_window_without_a_token_has_loss_and_gradients_of_0(scored):
    w = window()
    w["mask"] = torch.zeros_like(w["mask"])
    if not scored:
        w["completion_mask"] = w["mask"]
    w["hidden"].requires_grad_()
    w["weight"].requires_grad_()
    out = fused_policy_loss(**w, denominator=0.0)
    out.loss.backward()
    assert not torch.stack(out).any()
    assert not w["hidden"].grad.any()
    assert not w["weight"].grad.any()


def test_no_product_is_spent_on_a_token_without_gradient():
    """One token learns, the others have advantage 0 or are outside the loss's mask: one chunk, one row of it."""
    w = without(window(), "reference_logprob", "old_logprob", "surrogate_mask")
    w["mask"] = w["completion_mask"].clone()
    w["advantages"] = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    w["mask"][3] = False
    w["hidden"][3] = torch.inf  # its logits are nan, and no gradient is
    with Recorder() as seen:
        _, dh, dw = fused(w, 1.0, loss="dapo", chunk=4)
    assert seen.count("addmm") == 1
    assert dh.isfinite().all() and dw.isfinite().all()
    assert dh[1, 0].abs().min() > 0
    want = plain({**w, "hidden": w["hidden"].nan_to_num(0, 0, 0)}, 1.0, loss="dapo")
    torch.testing.assert_close(dh, want[1])
    torch.testing.assert_close(dw, want[2])


class Recorder(TorchDispatchMode):
    """Operators by name, and the storages of their answers, kept alive so that none is counted as another."""

    def __init__(self):
        super().__init__()
        self.names, self.storages = [], {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__.strip("_"))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return out

    def count(self, name):
        return self.names.count(name)

    def largest(self):
        return max(x.nbytes() for x in self.storages.values())

    def of_at_least(self, nbytes):
        return sum(x.nbytes() >= nbytes for x in self.storages.values())


@pytest.mark.parametrize("autocast", [False, True])
def test_memory_does_not_grow_with_the_tokens(autocast):
    """At a real vocabulary: one chunk and a weight's gradient, whatever the number of tokens."""
    vocabulary, features, chunk = 151_936, 4, 8
    weight = torch.randn(vocabulary, features, requires_grad=True)
    chunk_bytes, seen = chunk * vocabulary * 4, {}
    for tokens in (16, 48):
        w = {"hidden": torch.randn(2, tokens // 2, features), "weight": weight}
        w["ids"] = torch.randint(vocabulary, (2, tokens // 2))
        w["mask"] = w["completion_mask"] = torch.ones(2, tokens // 2, dtype=torch.bool)
        w["advantages"] = torch.tensor([1.0, -1.0])
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), Recorder() as seen[tokens]:
            fused_policy_loss(**w, denominator=2.0, chunk=chunk)
        assert seen[tokens].largest() == chunk_bytes
    # Logits and exponentials are one buffer; under bf16 the raised ones.
    assert [s.of_at_least(chunk_bytes) for s in seen.values()] == [1, 1]


def test_the_default_chunk():
    w = window()
    seen = []

    def loss(logprob, rows):
        seen.append(rows)
        return logprob

    tokens, vocabulary = 1500, 7
    hidden, ids = torch.randn(tokens, H), torch.randint(vocabulary, (tokens,))
    total, logprob = fused_loss(hidden, torch.randn(vocabulary, H), ids, loss, chunk=chunk_rows(vocabulary))
    assert seen == [slice(0, 1024), slice(1024, 1500)]
    assert logprob.shape == (tokens,)
    torch.testing.assert_close(total, logprob.sum())
    got, default = (fused(w, 5.0, chunk=t)[2] for t in (chunk_rows(V), None))
    assert torch.equal(got, default)


@pytest.mark.parametrize("loss", [*SEPARABLE, "gspo"])
def test_is_separable(loss):
    """An entropy that is only reported needs the whole distribution as well."""
    assert LossSettings(loss).is_separable == (loss != "gspo")
    assert not any(LossSettings(loss, entropy_coefficient=c).is_separable for c in (0.0, 0.01))


@pytest.mark.parametrize(("settings", "got"), [({"loss": "gspo"}, "gspo"), ({"entropy_coefficient": 0.0}, "entropy")])
def test_what_is_not_separable_is_refused(settings, got):
    with pytest.raises(ValueError, match=f"separable one\n  got: .*{got}"):
        fused_policy_loss(**window(), denominator=5.0, **settings)


@pytest.mark.parametrize(
    "key", ["ids", "completion_mask", "mask", "old_logprob", "reference_logprob", "surrogate_mask", "importance"]
)
def test_shapes_that_would_broadcast_are_refused(key):
    w = window()
    w[key] = w[key][:, :1]
    with pytest.raises(ValueError, match=f"{key} has a wrong shape"):
        fused_policy_loss(**w, denominator=5.0)


def test_other_mistakes_are_refused():
    w = window()
    with pytest.raises(ValueError, match="advantages has a wrong shape"):
        fused_policy_loss(**{**w, "advantages": w["advantages"][:1]}, denominator=5.0)
    with pytest.raises(ValueError, match="has a wrong shape"):
        fused_policy_loss(**{**w, "hidden": w["hidden"][0]}, denominator=5.0)
    with pytest.raises(ValueError, match="outside the completion mask"):
        fused_policy_loss(**{**w, "mask": torch.ones_like(w["mask"])}, denominator=5.0)
    with pytest.raises(ValueError, match="the loss lacks reference_logprob"):
        fused_policy_loss(**without(w, "reference_logprob"), denominator=5.0, kl_coefficient=0.1)
    with pytest.raises(ValueError, match="loss is unknown"):
        fused_policy_loss(**w, denominator=5.0, loss="ppo")
    with pytest.raises(ValueError, match="do not match"):
        fused_loss(torch.randn(3, H), torch.randn(V, H), torch.zeros(2, dtype=torch.long), None, chunk=2)
