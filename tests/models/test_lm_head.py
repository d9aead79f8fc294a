"""Body and head together are the policy, in every family whose logits are more than a product."""

import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, PhiConfig, Qwen2Config

from rlif_lightning.models.lm_head import body_and_head
from rlif_lightning.models.lora import add_lora
from rlif_lightning.sampling.check_decoding import check_decoding

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
FAMILIES = {
    "softcap": Gemma2Config(**SIZES, final_logit_softcapping=0.5, sliding_window=8),
    "divided": GraniteConfig(**SIZES, logits_scaling=4.0),
    "multiplied": CohereConfig(**SIZES, logit_scale=0.25),
    "bias": PhiConfig(**{**SIZES, "num_key_value_heads": 2}),
    "tied": Qwen2Config(**SIZES, tie_word_embeddings=True),
}


def model_of(family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("lm_head.bias"):
                weight.normal_()
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_head_of_body_is_the_model(family):
    model, ids = model_of(family), torch.tensor([[5, 6, 7, 8]])
    body, head = body_and_head(model)
    with torch.no_grad():
        hidden = body(input_ids=ids).last_hidden_state
        torch.testing.assert_close(head.logits(hidden), model(input_ids=ids).logits)
        assert (head.weight is not None) == (family in ("divided", "multiplied", "tied"))
        if head.weight is not None:
            torch.testing.assert_close(hidden @ head.weight.T * head.scale, model(input_ids=ids).logits)
    check_decoding(model, [1], 0)


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]])
def test_an_adapter_is_part_of_body_and_head(targets):
    policy = add_lora(model_of("tied"), {"r": 2, "target_modules": targets, "init_lora_weights": False})
    ids = torch.tensor([[5, 6, 7, 8]])
    body, head = body_and_head(policy)
    with torch.no_grad():
        expected = policy(input_ids=ids).logits
        with policy.disable_adapter():
            assert not torch.allclose(policy(input_ids=ids).logits, expected)
        torch.testing.assert_close(head.logits(body(input_ids=ids).last_hidden_state), expected)
    assert (head.weight is None) == ("lm_head" in targets)
