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
        model = policy.merge_and_unload(progressbar=sum(p.numel() for p in policy.parameters()) > LARGE)
    for parameter in model.parameters():  # not model.to(dtype): rotary frequencies stay in float32
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def unties(policy: Any) -> bool:
    """Whether an adapter changes one of two tied embeddings, so that they are two matrices once it is merged."""
    if not hasattr(policy, "get_base_model"):
        return False
    model = policy.get_base_model()
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return bool(model.config.get_text_config().tie_word_embeddings) and any(map(is_adapted, ends))


def is_adapted(module: nn.Module) -> bool:
    """Whether a module is one of PEFT's around another."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)


def _untie(policy: Any) -> None:
    """Give the head its own weights where an adapter is about to change only one of head and embedding."""
    if not unties(policy):
        return
    model = policy.get_base_model()
    head = model.get_output_embeddings()
    own: Any = getattr(head, "base_layer", getattr(head, "original_module", head))
    own.weight = nn.Parameter(own.weight.detach().clone(), requires_grad=False)
    for settings in (model.config.get_text_config(), model.config):
        settings.tie_word_embeddings = False
