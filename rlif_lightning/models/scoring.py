"""Forwards of a policy over prompts and completions, and the statistics of their tokens."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rlif_lightning.functional.chunked import LinearHead, chunk_rows, chunked_logprobs, chunked_stats
from rlif_lightning.functional.token_stats import NOTHING, Statistic, TokenStats
from rlif_lightning.models.lm_head import body_and_head
from rlif_lightning.rollout import Samples

# What the forward of an architecture raises that is not made for this.
FAILURES = (TypeError, ValueError, AttributeError, RuntimeError, IndexError, NotImplementedError)
DECODERS = "a decoder with a key-value cache, such as Qwen2, Qwen3, Llama, Gemma 3 or Mistral"


def tolerance(model: nn.Module) -> float:
    """Nats between two right ways to compute a log-probability; in half precision they are rounded differently."""
    return 1e-3 if next(model.parameters()).element_size() >= 4 else 0.25


def positions(mask: Tensor) -> Tensor:
    """Explicit position ids [N, L] of a left-padded mask: the first real token stands at 0."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


class CompletionScores:
    """Completions after a model's forward: statistics [N, T] of their tokens, 0 outside the completions.

    The logits are made from the hidden states a chunk of tokens at a time, and for real tokens only. Where gradients
    are enabled every statistic has its own, and the logits are computed again in the backward. Without gradient, and
    where the head is a weight alone, ``head_weight_only`` multiplies by that, as a fused update does; else the head
    is called, as by an update with autograd. What is done alike agrees bit for bit.
    """

    def __init__(self, model: nn.Module, samples: Samples, head_weight_only: bool = True) -> None:
        _, head = body_and_head(model)
        self.mask = samples.completion_mask  # [N, T]
        self.hidden = completion_hidden(model, samples)[self.mask]  # [M, H]
        self.ids = samples.completion_ids[self.mask]  # [M]
        weight = head.weight if head_weight_only and not torch.is_grad_enabled() else None
        self.head = head.logits if weight is None else LinearHead(weight, head.scale)
        width = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        self.chunk = chunk_rows(width)

    def logprobs(self, temperature: float) -> Tensor:
        """Log-probabilities [N, T] in nats of softmax(z / temperature)."""
        return self._padded(chunked_logprobs(self.hidden, self.head, self.ids, temperature, chunk=self.chunk))

    def stats(self, temperature: float, own: Mapping[str, Statistic] = NOTHING) -> TokenStats:
        """All statistics [N, T], see :func:`rlif_lightning.functional.token_stats.token_stats`."""
        return chunked_stats(self.hidden, self.head, self.ids, temperature, own, chunk=self.chunk).map(self._padded)

    def _padded(self, values: Tensor) -> Tensor:
        return values.new_zeros(self.mask.shape).masked_scatter(self.mask, values)


def completion_hidden(model: nn.Module, samples: Samples) -> Tensor:
    """Hidden states [N, T, H] that predict each completion token; the policy's head makes logits of them.

    Each distinct prompt goes through the model once and its keys and values serve all its completions, in the
    backward pass as well. Not so a model under gradient checkpointing, whose layers drop a cache in silence, and one
    whose weights are shared out (``shares_prompts`` False): all processes have to call its layers equally often,
    whatever their completions.
    """
    from transformers import DynamicCache

    body, _ = body_and_head(model)
    ids, prompt_mask = samples.prompt_ids, samples.prompt_mask
    first, group = _distinct(ids, prompt_mask)
    mask = torch.cat([prompt_mask, samples.completion_mask[:, :-1]], 1)
    where = positions(mask)
    if len(first) == len(ids) or _recomputes_layers(body) or not getattr(model, "shares_prompts", True):
        start = ids.shape[1] - 1
        ids = torch.cat([ids, samples.completion_ids[:, :-1]], 1)
        out = body(input_ids=ids, attention_mask=mask.long(), position_ids=where, use_cache=False)
        return out.last_hidden_state[:, start:]
    # Without a config: every token is kept, sliding windows are left to the mask.
    cached: dict[str, Any] = {"past_key_values": DynamicCache(), "use_cache": True}
    once = prompt_mask[first]
    prompts = body(input_ids=ids[first], attention_mask=once.long(), position_ids=positions(once), **cached)
    hidden = prompts.last_hidden_state[:, -1:][group]  # [N, 1, H]
    if samples.completion_ids.shape[1] == 1:
        return hidden
    cached["past_key_values"].batch_select_indices(group)
    ids, where = samples.completion_ids[:, :-1], where[:, ids.shape[1] :]
    rest = body(input_ids=ids, attention_mask=mask.long(), position_ids=where, **cached)
    return torch.cat([hidden, rest.last_hidden_state], 1)


def _distinct(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """A row [P] of each distinct prompt [N, L], and for each row which of them it has, [N]."""
    marked = ids.masked_fill(~mask, -1)
    _, group = torch.unique(marked, dim=0, return_inverse=True)
    rows = torch.arange(len(ids), device=ids.device)
    first = rows.new_full((int(group.max()) + 1,), len(ids)).scatter_reduce(0, group, rows, "amin")
    return first, group


def _recomputes_layers(body: nn.Module) -> bool:
    """Whether the layers recompute their activations when they train.

    Whether they train now does not matter: a reference computes what the update does, so that the divergence starts
    at exactly 0.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    return any(isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing for m in body.modules())
