"""One decoding step of Llama-like layers, written out.

Where few rows are open, much of a step of a small model is Python: modules that call modules, a norm of six
operations, keys and values repeated for each query head as soon as there is a mask. This is the same arithmetic with
far fewer operations. The linear layers are called as they are, so LoRA and 4-bit layers work and no weight is copied.
"""

from typing import Any

import torch
from torch import Tensor, nn

from rlif_lightning.models.lm_head import body_and_head
from rlif_lightning.sampling.decoders import PreallocatedDecoder

ARCHITECTURES = frozenset({"llama", "mistral", "qwen2", "qwen3"})


def decoder_for(policy: nn.Module) -> PreallocatedDecoder:
    """The fastest decoder that knows the policy's layers."""
    config: Any = body_and_head(policy)[0].config
    kinds = getattr(config, "layer_types", None)
    full = set(kinds) == {"full_attention"} if kinds else getattr(config, "sliding_window", None) is None
    return LlamaDecoder(policy) if config.model_type in ARCHITECTURES and full else PreallocatedDecoder(policy)


class LlamaDecoder(PreallocatedDecoder):
    """Steps through the layers itself; prompts are read by the model's own forward."""

    def next_hidden(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """See :class:`PreallocatedDecoder`."""
        body: Any = self.body
        x = body.embed_tokens(ids[:, 0])  # [n, H]
        cos, sin = body.rotary_emb(x, self.position)  # [n, 1, D] each
        half = cos.shape[-1] // 2
        sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)  # then a roll does what rotate_half does
        seen = None
        if mask is not None:
            # To be added to the products: torch takes half as long again for a bool mask, at every layer.
            seen = torch.zeros_like(mask, dtype=x.dtype).masked_fill_(~mask, torch.finfo(x.dtype).min)[:, None, None]
        for layer, kept in zip(body.layers, self.cache.layers, strict=True):
            attention = layer.self_attn
            y = _rms(x, layer.input_layernorm)
            projections = attention.q_proj, attention.k_proj, attention.v_proj
            q, k, v = (f(y).unflatten(1, (-1, attention.head_dim)) for f in projections)  # [n, heads, D]
            if hasattr(attention, "q_norm"):
                q, k = _rms(q, attention.q_norm), _rms(k, attention.k_norm)
            heads = q.shape[1]
            turned = torch.cat([q, k], 1)
            turned = torch.addcmul(turned * cos, turned.roll(half, -1), sin)
            keys, values = kept.update(turned[:, heads:, None], v[:, :, None])
            out = _attend(turned[:, :heads], keys, values, seen, attention.scaling)
            x = x + attention.o_proj(out.flatten(1))
            x = x + layer.mlp(_rms(x, layer.post_attention_layernorm))
        return _rms(x, body.norm)


def _attend(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None, scale: float) -> Tensor:
    """Attention [n, heads, D] of one token per row, whose heads share keys and values [n, shared, L, D]."""
    attend = nn.functional.scaled_dot_product_attention
    if seen is None:
        return attend(q[:, :, None], keys, values, scale=scale, enable_gqa=True)[:, :, 0]
    # With a mask torch would copy keys and values for each head: heads that share them are so many queries of one.
    grouped = q.unflatten(1, (keys.shape[1], -1))
    return attend(grouped, keys, values, attn_mask=seen.to(keys.dtype), scale=scale).flatten(1, 2)


def _rms(x: Tensor, norm: Any) -> Tensor:
    return nn.functional.rms_norm(x, (x.shape[-1],), norm.weight, norm.variance_epsilon)
