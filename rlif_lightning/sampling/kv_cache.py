"""A key-value cache that is written in place."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

STEP = 128  # tokens by which a cache grows at least


class PreallocatedLayer(CacheLayerMixin):
    """Keys and values of one layer in a block of memory with room for tokens to come.

    Attention reads a view of what is filled, so a token costs its own write and no copy of what is there.
    Sliding windows are left to the attention mask: every token is kept.
    """

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Memory of the first tokens' shape."""
        self.dtype, self.device = value_states.dtype, key_states.device
        # Under autocast keys come from the rotation in float32, and attention would round them to the values' dtype.
        self.keys, self.values = key_states[:, :, :0].to(self.dtype), value_states[:, :, :0]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [N, heads, t, D] and return all there is."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        end = self.length + key_states.shape[2]
        if end > self.keys.shape[2]:
            self.reserve(_room(end))
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def reserve(self, room: int) -> None:
        """Move to memory with room for so many tokens; what is filled goes along."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_empty(*old.shape[:2], room, old.shape[3])
            new[:, :, : self.length] = old[:, :, : self.length]
            setattr(self, name, new)

    def extend(self, length: int, room: int) -> None:
        """Fill up to a length with zeros, in memory with room for so many tokens."""
        assert self.keys is not None and self.values is not None
        if room > self.keys.shape[2]:
            self.reserve(room)
        self.keys[:, :, self.length :] = self.values[:, :, self.length :] = 0
        self.length = max(self.length, length)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Continue with these rows; one may come several times. Memory of rows that are gone is kept for the rest."""
        if not self.is_initialized:
            raise RuntimeError("the model does not use its key-value cache")
        n = len(indices)
        for name in ("keys", "values"):
            old = getattr(self, name)
            filled = old[:, :, : self.length][indices]
            new = old[:n] if n <= len(old) else old.new_empty(n, *old.shape[1:])
            new[:, :, : self.length] = filled
            setattr(self, name, new)

    def get_seq_length(self) -> int:
        """Tokens in the cache."""
        return self.length

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys that the attention sees, position of the first)."""
        return self.length + query_length, 0


def preallocated_cache(body: Any) -> Cache:
    """A cache of :class:`PreallocatedLayer` for all layers of a model."""
    return Cache(layers=[PreallocatedLayer() for _ in range(body.config.get_text_config().num_hidden_layers)])


def _room(tokens: int) -> int:
    """Tokens for which a layer makes room when it has to hold so many."""
    return max(tokens + STEP, tokens * 5 // 4)


def cache_room(prompt: int, tokens: int) -> int:
    """Tokens for which a row's cache has room in the end, after a prompt and a completion of so many tokens."""
    room = _room(prompt)
    while room < prompt + tokens - 1:  # the last token is not read
        room = _room(room + 1)
    return room


def bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Memory of one token's keys and values in all layers of a model of this configuration."""
    config = config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * size * dtype.itemsize
