"""The loss against TRL's own code: ``GRPOTrainer._compute_loss`` on given log-probabilities and entropies.

What is equated, since the two put their factors in different places:

- TRL's micro-batch is the whole window here (one step of accumulation, one process), so that its mean over the
  rows or tokens of a micro-batch is our sum divided by the window's denominator. Over several micro-batches
  TRL's grpo, bnpo and gspo weigh micro-batches equally, ours rows or tokens; that is on purpose.
- TRL's rows all hold a token; dr_grpo's constant is TRL's max_completion_length, our max_tokens.
- gspo is TRL's ``importance_sampling_level="sequence"`` with ``loss_type="grpo"``.
- cispo's cap is TRL's epsilon_high itself, our 1 + clip_high.
- The entropy bonus is TRL's mean over all tokens whatever the loss; ours has the loss's own token weights. They are
  one thing where tokens weigh equally (dapo, bnpo, cispo), for rows of equal length (grpo, gspo), and for dr_grpo up
  to tokens / (rows x max_tokens). With a top-entropy mask TRL's bonus acts on the mask, ours on all tokens.
- The top-entropy threshold is a quantile of the update's own entropies in TRL, of the sampler's in training here; on
  policy they are one. With gspo TRL's mask, and its weights of tokens that vLLM drew, scale a sequence's loss; ours
  act on each token's gradient: the values are one, the gradients are not.
"""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from rlif_lightning.functional.entropy import adapted_coefficient, top_entropy_mask
from tests.functional.loss_calls import loss_denominator, policy_loss

pytest.importorskip("trl", reason="trl is the oracle of these tests: pip install -e '.[test]'")
grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="this trl has no GRPOTrainer to compare with")
GRPOTrainer = grpo_trainer.GRPOTrainer

LOSSES = ["grpo", "dapo", "bnpo", "dr_grpo", "gspo", "cispo"]
N, T, MAX_TOKENS = 6, 8, 11
LOW, HIGH = 0.1, 0.15


class Accelerator:
    """One process, at the end of an accumulation window."""

    num_processes, sync_gradients = 1, True

    def gather(self, x):
        return x

    def pad_across_processes(self, x, dim, pad_index):
        return x

    def reduce(self, x, reduction):
        return x


class StandIn:
    """All that ``_compute_loss`` asks of a trainer; the arithmetic is TRL's own."""

    _compute_loss = GRPOTrainer._compute_loss
    get_high_entropy_mask = GRPOTrainer.get_high_entropy_mask

    def __init__(self, loss, logprob, entropy, *, beta=0.0, fraction=1.0, bonus=0.0, adaptive=None):
        self.loss_type = "grpo" if loss == "gspo" else loss
        self.importance_sampling_level = "sequence" if loss == "gspo" else "token"
        self.epsilon_low, self.epsilon_high = LOW, 1 + HIGH if loss == "cispo" else HIGH
        self.beta, self.top_entropy_quantile, self.max_completion_length = beta, fraction, MAX_TOKENS
        self.entropy_coef, self.use_adaptive_entropy = bonus, adaptive is not None
        self._entropy_bonus_enabled = bonus != 0 or self.use_adaptive_entropy
        self._last_world_entropy, self._entropy_window_stats = float("inf"), None
        self.args = SimpleNamespace(
            use_bias_correction_kl=False, delta=None, steps_per_generation=1, entropy_target=adaptive,
            entropy_coef_delta=0.005, entropy_coef_min=0.0, entropy_coef_max=1.0,
        )  # fmt: skip
        self.aux_loss_enabled = self.use_vllm = self.vllm_importance_sampling_correction = False
        self.off_policy_mask_threshold, self.current_gradient_accumulation_steps = None, 1
        self.model = SimpleNamespace(training=True)
        self.accelerator = Accelerator()
        self._metrics = {"train": defaultdict(list)}
        self.forward = (logprob, entropy, None)

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        return self.forward

    def loss(self, w):
        inputs = {
            "prompt_ids": torch.zeros(N, 1),
            "prompt_mask": torch.ones(N, 1),
            "completion_ids": torch.zeros(N, T),
            "completion_mask": w["mask"].long(),
            "advantages": w["advantages"],
            "ref_per_token_logps": w["reference_logprob"],
            "num_items_in_batch": w["mask"].sum(),
        }
        if "old_logprob" in w:
            inputs["old_per_token_logps"] = w["old_logprob"]
        if "importance" in w:
            self.use_vllm = self.vllm_importance_sampling_correction = True
            inputs["importance_sampling_ratio"] = w["importance"]
        return self._compute_loss(None, inputs)

    def logged(self, name):
        return self._metrics["train"][name][-1]


def window(seed=0, lengths=(5, 1, 8, 2, 7, 3), off_policy=True):
    """A window in float32, off policy enough that tokens and sequences are clipped on both sides."""
    g = torch.Generator().manual_seed(seed)
    logprob = -torch.randn(N, T, generator=g).abs() - 0.1
    row = torch.tensor([0.3, -0.3, 0.1, -0.1, 0.25, -0.2])[:, None]
    w = {
        "advantages": torch.tensor([1.0, -1.0, -0.5, 0.7, -2.0, 1.3]),
        "mask": torch.arange(T) < torch.tensor(lengths)[:, None],
        "reference_logprob": logprob + torch.randn(N, T, generator=g) * 0.5,
        "entropy": torch.randn(N, T, generator=g).abs().requires_grad_(),
    }
    if off_policy:
        w["old_logprob"] = logprob + row + torch.randn(N, T, generator=g) * 0.2
    return {**w, "logprob": logprob.requires_grad_()}


def ours(w, loss, **settings):
    d = loss_denominator(w["mask"], loss, MAX_TOKENS)
    return policy_loss(**w, denominator=d, loss=loss, clip_low=LOW, clip_high=HIGH, **settings)


def assert_same(mine, theirs, w, gradients=True):
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert theirs.abs() > 1e-4
    leaves = [w["logprob"], w["entropy"]]
    if gradients:
        a, b = (torch.autograd.grad(x, leaves, allow_unused=True, materialize_grads=True) for x in (mine, theirs))
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
        assert b[0].abs().max() > 1e-3


@pytest.mark.parametrize("beta", [0.0, 0.4])
@pytest.mark.parametrize("off_policy", [True, False])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("seed", [0, 1])
def test_loss_and_kl(loss, seed, off_policy, beta):
    w = window(seed, off_policy=off_policy)
    trl = StandIn(loss, w["logprob"], w["entropy"], beta=beta)
    theirs, mine = trl.loss(w), ours(w, loss, kl_coefficient=beta)
    assert_same(mine.loss, theirs, w)
    tokens = mine.tokens.item()
    assert trl.logged("entropy") == pytest.approx((mine.entropy / tokens).item(), rel=1e-5)
    if beta:
        assert trl.logged("kl") == pytest.approx((mine.kl / tokens).item(), rel=1e-5)
    if loss not in ("gspo", "cispo"):  # there TRL counts sequences, and positive advantages only
        assert trl.logged("clip_ratio/region_mean") == pytest.approx((mine.clipped / tokens).item(), rel=1e-5)
    assert (mine.clipped > 0) == off_policy


@pytest.mark.parametrize("fraction", [0.2, 0.5])
@pytest.mark.parametrize("loss", LOSSES)
def test_top_entropy_mask(loss, fraction):
    w = window()
    theirs = StandIn(loss, w["logprob"], w["entropy"], beta=0.4, fraction=fraction).loss(w)
    chosen = top_entropy_mask(w["entropy"].detach(), w["mask"], fraction)
    assert 0 < chosen.sum() < w["mask"].sum()
    assert_same(ours({**w, "surrogate_mask": chosen}, loss, kl_coefficient=0.4).loss, theirs, w, loss != "gspo")


@pytest.mark.parametrize("off_policy", [True, False])
@pytest.mark.parametrize("loss", LOSSES)
def test_importance(loss, off_policy):
    """The weight of tokens that vLLM drew: TRL's token_truncate."""
    w = window(off_policy=off_policy)
    w["importance"] = torch.linspace(0.2, 3.0, N * T).view(N, T).clamp(max=2.0)
    theirs = StandIn(loss, w["logprob"], w["entropy"], beta=0.4).loss(w)
    mine = ours(w, loss, kl_coefficient=0.4)
    assert_same(mine.loss, theirs, w, loss != "gspo")
    without = ours({k: x for k, x in w.items() if k != "importance"}, loss, kl_coefficient=0.4)
    assert (mine.loss - without.loss).abs() > 1e-3


@pytest.mark.parametrize("loss", LOSSES)
def test_entropy_bonus(loss):
    w = window(lengths=(5,) * N) if loss in ("grpo", "gspo") else window()
    theirs = StandIn(loss, w["logprob"], w["entropy"], beta=0.4, bonus=0.3).loss(w)
    coefficient = 0.3 * (N * MAX_TOKENS / w["mask"].sum().item() if loss == "dr_grpo" else 1)
    assert_same(ours(w, loss, kl_coefficient=0.4, entropy_coefficient=coefficient).loss, theirs, w)


def test_adapted_coefficient():
    """The controller over six windows of falling, then rising entropy, and when it acts."""
    w = window()
    mean = (w["entropy"] * w["mask"]).sum() / w["mask"].sum()
    coefficient, is_low = 0.01, False
    trl = StandIn("dapo", w["logprob"], None, bonus=coefficient, adaptive=0.5)
    for entropy in (0.9, 0.4, 0.3, 0.6, 0.7, 0.2):
        scaled = {**w, "entropy": (w["entropy"] * (entropy / mean)).detach().requires_grad_()}
        trl.forward = (w["logprob"], scaled["entropy"], None)
        mine = ours(scaled, "dapo", entropy_coefficient=coefficient if is_low else 0.0)
        assert_same(mine.loss, trl.loss(scaled), scaled)
        value = (mine.entropy / mine.tokens).item()
        is_low, coefficient = value < 0.5, adapted_coefficient(coefficient, value, 0.5)
        assert trl.entropy_coef == pytest.approx(coefficient)
    assert coefficient == pytest.approx(0.01)
