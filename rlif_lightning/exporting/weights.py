"""A policy's weights from a checkpoint, and as files: merged into its base model, or its adapter alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from rlif_lightning.models.checkpoints import weights_of
from rlif_lightning.models.policy import Policy, PolicySettings
from rlif_lightning.models.trainable import put_weights

Format = Literal["merged", "adapter"]


def load_trained(
    settings: PolicySettings, checkpoint: dict[str, Any], dtype: torch.dtype, tokenizer: Any, quantized: bool = True
) -> Policy:
    """The policy of training with the weights of a checkpoint, on the CPU; float16 is computed in float32.

    Only a policy that is ``quantized`` as in training can be checked against the checkpoint.
    """
    settings = replace(settings, gradient_checkpointing=False)
    settings = settings if quantized else replace(settings, quantization=None)
    dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    policy = Policy.load(settings, dtype=dtype, tokenizer=tokenizer)
    if quantized:
        policy.check_checkpoint(checkpoint)
    put_weights(policy.model, weights_of(checkpoint))
    policy.model.requires_grad_(False)
    return policy


def save_adapter(policy: Any, folder: Path, base: str) -> None:
    """Write an adapter as PEFT does; ``base`` is the name of its base model, for PEFT to load it from the hub."""
    for config in policy.peft_config.values():
        config.base_model_name_or_path = base
    policy.save_pretrained(folder, save_embedding_layers=False)


def save_generation_config(base: Any, policy: Policy, temperature: float | None, folder: Path) -> None:
    """Write the settings under which accuracy was measured: all that ends a text, and the sampling of the evaluation.

    What the base model brings along, such as a repetition penalty or a top-k filter, never acted in training. No
    longest completion: vLLM's server would take it for a limit, and lm-evaluation-harness could not set its own.
    Of the base model's config only the beginning token is taken; without a temperature decoding is greedy.
    """
    from transformers import GenerationConfig

    # top_k 0: transformers would otherwise sample among the 50 most likely tokens.
    sampled = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
    GenerationConfig(
        bos_token_id=getattr(base, "bos_token_id", None),
        pad_token_id=policy.tokenizer.pad_token_id,
        eos_token_id=policy.end_ids,
        stop_strings=list(policy.settings.stop) or None,
        **({"do_sample": False} if temperature is None else sampled),
    ).save_pretrained(folder)
