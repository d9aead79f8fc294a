"""A policy's adapter merged into its base model."""

from typing import Any

import torch
from torch import nn

LARGE = 1e9  # parameters, from which a progress bar is worth it


def merge(policy: Any, dtype: torch.dtype) -> Any:
    """The policy, with or without an adapter, as a plain model of one precision; the policy is taken apart.

    Not for 4-bit weights: merging into them would round the update away.
    """
    model = policy
    if hasattr(policy, "merge_and_unload"):
        _untie(policy)
        model = policy.merge_and_unload(progressbar=is_large(policy))
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


def is_large(model: nn.Module) -> bool:
    """Whether work on all weights takes so long that a user wants to see a bar."""
    return sum(parameter.numel() for parameter in model.parameters()) > LARGE
