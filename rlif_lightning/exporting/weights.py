"""A policy's weights from a checkpoint, and as files: merged into its base model, or its adapter alone."""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from rlif_lightning.models.lora import find_adapter
from rlif_lightning.models.policy import fingerprint, load_policy
from rlif_lightning.models.quantization import Quantization
from rlif_lightning.models.trainable import put_weights

Format = Literal["merged", "adapter"]
FILE_SIZE = "4GB"  # largest weight file of a merged model
BAR_FROM = 1e9  # parameters from which a progress bar is worth it


def load_trained(
    module: Any, checkpoint: dict[str, Any], dtype: torch.dtype, quantization: Quantization | None
) -> Any:
    """The policy with the weights of a checkpoint, on the CPU.

    Args:
        module: The RLIFModule with the settings of training.
        checkpoint: Of the run.
        dtype: Dtype of the export; half precision other than bfloat16 is computed in float32.
        quantization: That of training, with which the checkpoint is checked to be this model's; or None.

    Raises:
        UserError: The checkpoint belongs to another model.
    """
    adapter = None if module.adapter is None else find_adapter(module.adapter)
    module.lora = module.lora if adapter is None else adapter.lora
    policy = load_policy(
        module.name,
        dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32,
        lora=module.lora,
        adapter=adapter,
        quantization=quantization,
        revision=module.revision,
        attn_implementation=module.attn_implementation,
        trust_remote_code=module.trust_remote_code,
    )
    if quantization == module.quantization:
        module.policy, module.fingerprint = policy, fingerprint(policy)
        module.on_load_checkpoint(checkpoint)
        module.policy = None
    put_weights(policy, {k.removeprefix("policy."): v for k, v in checkpoint["state_dict"].items()})
    return policy.requires_grad_(False)


def merge(policy: Any, dtype: torch.dtype) -> Any:
    """The policy as a plain model of one precision; the policy is taken apart.

    Args:
        policy: With or without an adapter. No 4-bit weights: merging into them would round the update away.
        dtype: Dtype of the result's weights.
    """
    model = policy
    if hasattr(policy, "merge_and_unload"):
        _untie(policy)
        model = policy.merge_and_unload(progressbar=_size(policy) > BAR_FROM)
    for parameter in model.parameters():  # not model.to(dtype): rotary frequencies stay in float32
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def _untie(policy: Any) -> None:
    """Give the head its own weights where an adapter is about to change only one of head and embedding."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    model = policy.get_base_model()
    config = model.config.get_text_config()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    adapted = any(isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper) for m in (head, embedding))
    if not config.tie_word_embeddings or not adapted:
        return
    own: Any = getattr(head, "base_layer", getattr(head, "original_module", head))
    own.weight = nn.Parameter(own.weight.detach().clone(), requires_grad=False)
    for settings in (config, model.config):
        settings.tie_word_embeddings = False


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def save_merged(model: Any, folder: Path) -> None:
    """Write weights and configuration, in several files where they are large; a small model shows no bar."""
    from transformers.utils import logging

    shows_bar = logging.is_progress_bar_enabled()
    if _size(model) < BAR_FROM:
        logging.disable_progress_bar()
    try:
        model.save_pretrained(folder, max_shard_size=FILE_SIZE)
    finally:
        if shows_bar:
            logging.enable_progress_bar()


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
