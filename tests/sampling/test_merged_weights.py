"""A policy as plain matrices: what another engine is given computes what the policy does."""

import copy

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from rlif_lightning.errors import UserError
from rlif_lightning.models.lora import add_lora
from rlif_lightning.models.merging import unties
from rlif_lightning.sampling.vllm.merged_weights import merged_weights
from tests.conftest import make_config, make_model

IDS = torch.arange(3, 19).view(2, 8)
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
SETTINGS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "all": {"target_modules": "all-linear"},
    "embeddings": {"target_modules": [*TARGETS, "embed_tokens"]},
    "whole modules": {"modules_to_save": ["norm"]},
    "head": {"target_modules": [*TARGETS, "lm_head"]},
}


def adapted(model, **settings):
    """A policy whose adapter does something."""
    torch.manual_seed(1)
    policy = add_lora(model, {"r": 4, "lora_alpha": 16, "target_modules": TARGETS, **settings})
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return policy


def rebuilt(policy, config):
    """A plain model with the dense weights and nothing else."""
    weights = dict(merged_weights(policy))
    if config.tie_word_embeddings:
        torch.testing.assert_close(weights["lm_head.weight"], weights["model.embed_tokens.weight"], atol=0, rtol=0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.load_state_dict(weights, strict=True)
    return model


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_is_merged_and_the_policy_left_alone(settings, tied):
    policy = adapted(make_model("qwen2", tie_word_embeddings=tied), **settings)
    before = copy.deepcopy(policy.state_dict())
    touches = {"lm_head", "embed_tokens"} & set(settings.get("target_modules", ()))
    assert unties(policy) == (tied and bool(touches))
    with torch.no_grad():
        want = policy(input_ids=IDS).logits
        with policy.disable_adapter():
            assert (policy(input_ids=IDS).logits - want).abs().max() > 1e-2
        config = make_config("qwen2", 320, tie_word_embeddings=tied and not unties(policy))
        got = rebuilt(policy, config)(input_ids=IDS).logits
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(policy(input_ids=IDS).logits, want, atol=0, rtol=0)
    for name, weight in policy.state_dict().items():
        assert torch.equal(weight, before[name])


def test_a_plain_policy_gives_its_own_weights():
    model = make_model("gemma3")
    own = dict(model.named_parameters(remove_duplicate=False))
    for name, weight in merged_weights(model):
        assert weight.data_ptr() == own[name].data_ptr() and not weight.requires_grad
    assert dict(merged_weights(model)).keys() == own.keys()


def test_4_bit_matrices_are_unpacked(tmp_path):
    from transformers import BitsAndBytesConfig

    plain = make_model("llama", hidden_size=64, intermediate_size=64)
    plain.save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings, dtype=torch.float32)
    for layer in model.modules():
        layer.support_avx512bf16_for_cpu = False  # as every policy is loaded
    policy = adapted(model)
    with torch.no_grad():
        want = policy(input_ids=IDS).logits
        assert (plain(input_ids=IDS).logits - want).abs().mean() > 0.2
        got = rebuilt(policy, plain.config)(input_ids=IDS).logits
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_adapters_that_no_matrix_expresses_are_refused():
    biased = adapted(make_model(), lora_bias=True)
    with pytest.raises(UserError, match="lora_bias"):
        list(merged_weights(biased))
    other = get_peft_model(
        make_model(), IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    )
    with pytest.raises(UserError, match="expected: LoRA or DoRA"):
        list(merged_weights(other))
    several = get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    several.add_adapter("second", LoraConfig(target_modules=["v_proj"], init_lora_weights=False))
    with torch.no_grad():
        torch.testing.assert_close(
            rebuilt(several, make_config("qwen2", 320))(input_ids=IDS).logits,
            several(input_ids=IDS).logits,
            atol=1e-4,
            rtol=1e-4,
        )
