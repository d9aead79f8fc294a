"""A policy's weights from a checkpoint, and as files: merged into its base model, or its adapter alone."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from rlif_lightning.models.checkpoints import weights_of
from rlif_lightning.models.merging import is_large
from rlif_lightning.models.policy import Policy, PolicySettings
from rlif_lightning.models.trainable import put_weights
from rlif_lightning.warnings_shown import no_saving_bar

Format = Literal["merged", "adapter"]
FILE_SIZE = "4GB"  # largest weight file of a merged model


def load_trained(
    settings: PolicySettings, checkpoint: dict[str, Any], dtype: torch.dtype, tokenizer: Any, quantized: bool = True
) -> Policy:
    """The policy with the weights of a checkpoint, on the CPU.

    Args:
        settings: Those of training.
        checkpoint: Of the run.
        dtype: Dtype of the export; float16 is computed in float32.
        tokenizer: The model's tokenizer.
        quantized: As in training, so that the checkpoint can be checked; False: without quantization, unchecked.

    Raises:
        UserError: The checkpoint belongs to another model.
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


def save_merged(model: Any, folder: Path) -> None:
    """Write weights and configuration, in several files where they are large; a small model shows no bar."""
    with nullcontext() if is_large(model) else no_saving_bar():
        model.save_pretrained(folder, max_shard_size=FILE_SIZE)


def save_adapter(policy: Any, folder: Path, base: str) -> None:
    """Write an adapter as PEFT does.

    Args:
        policy: With the adapter.
        folder: Where to.
        base: Name or path from which PEFT will load the base model.
    """
    for config in policy.peft_config.values():
        config.base_model_name_or_path = base
    policy.save_pretrained(folder, save_embedding_layers=False)
