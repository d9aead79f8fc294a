"""The plain forward of a policy over prompts and completions.

This is the reference that every faster path is tested against.
"""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from rlif_lightning.functional.token_stats import TokenStats, token_stats
from rlif_lightning.rollout import Samples


def positions(mask: Tensor) -> Tensor:
    """Explicit position ids [N, L] of a left-padded mask: the first real token stands at 0."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def completion_logits(model: nn.Module, samples: Samples) -> Tensor:
    """Logits [N, T, V] that predict each completion token."""
    ids = torch.cat([samples.prompt_ids, samples.completion_ids], 1)  # [N, L+T]
    mask = torch.cat([samples.prompt_mask, samples.completion_mask], 1)
    start = samples.prompt_ids.shape[1] - 1  # the last prompt token predicts the first completion token
    # Indices, not a number: with a number the head gets a view, which torch multiplies by another kernel where
    # the head is frozen, and the divergence from a frozen copy would not start at exactly 0.
    keep = torch.arange(start, ids.shape[1] - 1, device=ids.device)
    out = model(
        input_ids=ids,
        attention_mask=mask.long(),
        position_ids=positions(mask),
        use_cache=False,
        logits_to_keep=keep,
    )
    return out.logits


def score(model: nn.Module, samples: Samples, temperature: float, extra: Collection[str] = ()) -> TokenStats:
    """Statistics [N, T] of given completions under a model, in nats, of softmax(z / temperature)."""
    return token_stats(completion_logits(model, samples), samples.completion_ids, temperature, extra)
