"""Loss and gradients of a slice against Hugging Face's own forward, all logits and plain autograd, in float64."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Qwen2Config

from rlif_lightning.functional.loss_records import LossInputs, LossSettings
from rlif_lightning.functional.losses import loss_denominator, policy_loss
from rlif_lightning.functional.token_stats import token_stats
from rlif_lightning.models.lora import add_lora
from rlif_lightning.models.policy import set_training_mode
from rlif_lightning.models.scoring import CompletionScores, completion_hidden
from rlif_lightning.rewards import ExpectedAgreement, ProbabilityMargin
from rlif_lightning.rewards.base import statistics_of
from rlif_lightning.rollout import Rollout
from rlif_lightning.sampling import NativeSampler, Sampling
from rlif_lightning.training.slice_loss import slice_loss
from tests.conftest import ARCHITECTURES, completion_logits, make_model
from tests.models.test_lm_head import FAMILIES, model_of

SETTINGS = LossSettings("grpo", clip_low=0.2, clip_high=0.3, kl_coefficient=0.04)
LORA = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "up_proj"], "init_lora_weights": False}


def rollout_of(policy, vocabulary, tau=0.8, lengths=(3, 19, 11), group=4, new=16):
    """A rollout of ragged groups whose old and reference log-probabilities are somewhere near."""
    g = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, vocabulary, (n,), generator=g).tolist() for n in lengths]
    sampler = NativeSampler()
    sampler.update(policy, list(range(0, vocabulary, 15)), 0)
    samples = sampler.sample(prompts, group, torch.arange(len(lengths) * group), Sampling(new, tau))
    n, t = samples.completion_ids.shape
    mask = samples.completion_mask.clone()
    mask[2] = False  # a row that was left out, as truncated ones may be
    return Rollout(
        samples,
        group,
        tau,
        torch.arange(n),
        advantages=torch.randn(n, generator=g),
        loss_mask=mask,
        kl_logprob=samples.logprob + 0.2 * torch.randn(n, t, generator=g),
        surrogate_mask=mask & (torch.rand(n, t, generator=g) < 0.8),
        importance=(0.4 * torch.randn(n, t, generator=g)).exp().clamp(max=1.5),
    ), samples.logprob + 0.3 * torch.randn(n, t, generator=g)


def reference_loss(policy, rollout, old, denominator, settings):
    """The same by whole logits."""
    logits = completion_logits(policy, rollout.samples)
    logprob, entropy = token_stats(logits, rollout.samples.completion_ids, rollout.temperature)[:2]
    inputs = LossInputs(
        rollout.advantages,
        rollout.loss_mask,
        old_logprob=old,
        reference_logprob=rollout.kl_logprob,
        surrogate_mask=rollout.surrogate_mask,
        importance=rollout.importance,
    )
    entropy = None if settings.entropy_coefficient is None else entropy
    return policy_loss(logprob, inputs, denominator, settings, entropy)


def gradients(policy, result):
    policy.zero_grad()
    result.loss.backward()
    return {n: p.grad.clone() for n, p in policy.named_parameters() if p.requires_grad}


def assert_same_update(policy, loss="grpo", bonus=None, on_policy=False, tolerance=1e-5, checkpointing=False):
    vocabulary = policy.get_input_embeddings().weight.shape[0]
    rollout, old = rollout_of(policy, vocabulary)
    old = None if on_policy else old
    settings = replace(SETTINGS, name=loss, entropy_coefficient=bonus)
    denominator = loss_denominator(rollout.loss_mask, settings, 16)
    exact = copy.deepcopy(policy).double()
    expected = reference_loss(exact, rollout, old, denominator, settings)
    if checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
        set_training_mode(policy, training=True)
    result = slice_loss(policy, rollout, denominator, old, settings)
    for name, mine, value in zip(result._fields, result, expected, strict=True):
        torch.testing.assert_close(
            mine.double(), value, atol=2e-5 * max(1, abs(float(value.detach()))), rtol=0, msg=name
        )
    want, got = gradients(exact, expected), gradients(policy, result)
    assert want.keys() == got.keys() and sum(float(g.norm()) > 0 for g in want.values()) > len(want) // 2
    difference = torch.cat([(got[n].double() - g).flatten() for n, g in want.items()]).norm()
    whole = torch.cat([g.flatten() for g in want.values()]).norm()
    assert float(difference / whole) < tolerance
    for name, g in want.items():  # one by one as well: a small weight's error would not show in the whole
        assert float((got[name].double() - g).norm()) < 1e-4 * float(g.norm()) + 1e-6 * float(whole), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("loss", ["grpo", "gspo"])
def test_every_architecture(architecture, loss):
    assert_same_update(make_model(architecture), loss)


@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo", "gspo", "cispo"])
@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("bonus", [None, 0.1])
def test_every_loss(loss, on_policy, bonus):
    assert_same_update(make_model("qwen2"), loss, bonus, on_policy)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_head(family):
    """Soft caps, factors, biases, tied weights."""
    assert_same_update(model_of(family))


@pytest.mark.parametrize("targets", [LORA["target_modules"], ["q_proj", "lm_head"]], ids=["body", "head"])
@pytest.mark.parametrize("tied", [True, False])
def test_adapters(targets, tied):
    model = make_model("qwen2", tie_word_embeddings=tied)
    assert_same_update(add_lora(model, {**LORA, "target_modules": targets}))


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_under_gradient_checkpointing(lora):
    model = make_model("qwen3")
    assert_same_update(model if lora is None else add_lora(model, lora), checkpointing=True)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hidden_states_of_shared_prompts(architecture):
    """Whatever rows a slice has; and every distinct prompt is computed once."""
    model = make_model(architecture)
    rollout, _ = rollout_of(model, 320)
    rows = []
    model.model.embed_tokens.register_forward_pre_hook(lambda m, args: rows.append(tuple(args[0].shape)))
    for index in (torch.arange(12), torch.tensor([9, 3, 1, 7, 2]), torch.tensor([5, 0]), torch.tensor([4, 5])):
        samples = rollout.samples.rows(index)
        mask = samples.completion_mask
        with torch.no_grad():
            rows.clear()
            mine = completion_hidden(model, samples)
            asked, distinct = list(rows), len({int(i) // 4 for i in index})
            model.shares_prompts = False
            whole = completion_hidden(model, samples)
            model.shares_prompts = True
        torch.testing.assert_close(mine[mask], whole[mask], atol=1e-5, rtol=1e-5)
        if distinct < len(index):
            assert asked[0] == (distinct, samples.prompt_ids.shape[1])
            assert asked[1:] == [(len(index), mask.shape[1] - 1)] * (mask.shape[1] > 1)
        else:
            assert len(asked) == 1


def test_scores_are_those_of_whole_logits():
    model = make_model("gemma3")
    rollout, _ = rollout_of(model, 320)
    samples, mask = rollout.samples, rollout.samples.completion_mask
    own = statistics_of([ExpectedAgreement(), ProbabilityMargin()])
    with torch.no_grad():
        expected = token_stats(completion_logits(model, samples), samples.completion_ids, 0.8, own)
        scored = CompletionScores(model, samples)
        for mine, value in zip(scored.stats(0.8, own).tensors, expected.tensors, strict=True):
            torch.testing.assert_close(mine[mask], value[mask], atol=1e-5, rtol=1e-4)
            assert not mine[~mask].any()
        torch.testing.assert_close(scored.logprobs(0.8)[mask], expected.logprob[mask], atol=1e-5, rtol=1e-4)


class Largest(TorchDispatchMode):
    """The largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


def test_no_tensor_grows_with_tokens_times_vocabulary():
    """At the vocabulary of Qwen: rollout, reference and update of 10 and of 24 tokens make the same largest tensor.

    It is the weight [V, H], or a chunk of logits.
    """
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=151_936,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=0,
        bos_token_id=None,
    )
    model, largest = AutoModelForCausalLM.from_config(config), []
    sampler = NativeSampler()
    sampler.update(model.eval(), [0], 0)
    for new in (10, 24):
        with Largest() as seen:
            samples = sampler.sample([[5, 6, 7]] * 2, 8, torch.arange(16), Sampling(new))
            with torch.no_grad():
                reference = CompletionScores(model, samples).logprobs(1.0)
            mask = samples.completion_mask
            rollout = Rollout(
                samples,
                8,
                1.0,
                torch.arange(16),
                advantages=torch.ones(16),
                loss_mask=mask,
                kl_logprob=reference,
            )
            slice_loss(model, rollout, 16.0, None, SETTINGS).loss.backward()
        largest.append(seen.elements)
    chunk = 128 * 151_936
    assert largest[0] == largest[1] == chunk < samples.completion_ids.numel() * 151_936
