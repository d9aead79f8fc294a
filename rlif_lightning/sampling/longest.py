"""The most that the native sampler ever holds: the last token of completions that have all grown to the limit."""

from collections.abc import Sequence

import torch

from rlif_lightning.sampling.kv_cache import cache_room
from rlif_lightning.sampling.llama_decoder import decoder_for
from rlif_lightning.sampling.native import NativeSampler, pad_left
from rlif_lightning.sampling.protocol import Sampling
from rlif_lightning.sampling.token_sampling import TokenSampler


@torch.no_grad()
def sample_last_token(
    sampler: NativeSampler, prompts: Sequence[Sequence[int]], group_size: int, sampling: Sampling
) -> None:
    """Decode the last token of a full batch after empty keys and values, and forget it.

    Args:
        sampler: Up to date with the policy.
        prompts: The longest ones, the very longest first; as many as fit are taken.
        group_size: Completions per prompt.
        sampling: How long a completion may be, and its temperature.
    """
    assert sampler.policy is not None
    longest, tokens = len(prompts[0]), sampling.max_new_tokens
    rows = sampler.rows_that_fit(longest + tokens) if sampler.rows is None else sampler.rows
    if rows is not None:
        prompts = prompts[: max(1, rows // group_size)]
    device = next(sampler.policy.parameters()).device
    ids, mask = pad_left(prompts, sampler.pad_id, device)
    decoder = decoder_for(sampler.policy)
    decoder.prefill(ids, mask)
    group = torch.arange(len(prompts), device=device).repeat_interleave(group_size)
    decoder.select_rows(group)
    for layer in decoder.cache.preallocated:
        layer.extend(longest + tokens - 2, cache_room(longest, tokens))
    decoder.mask = torch.cat([decoder.mask, decoder.mask.new_ones(len(group), tokens)], 1)
    z = decoder.step(ids[group, -1]).float()
    TokenSampler()(z if sampling.temperature == 1 else z / sampling.temperature, None)
