"""Attention heads made wider without changing what they compute, for kernels that know certain sizes only.

A head of size d becomes one of size D > d: its features take the places that turn at their own speed under rotary
embeddings of D, all others are 0. With i < d/2 and D = m d, feature i of the first half stands at m i and that of the
second half at D/2 + m i, since base^(-2 i / d) = base^(-2 m i / D). Attention divides the scores by sqrt(D) instead
of sqrt(d), so queries are multiplied by sqrt(m).
"""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

ARCHITECTURES = frozenset({"llama", "mistral", "qwen2"})  # no norm over a head's features


def head_size(config: Any) -> int:
    """Features of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def wider(config: Any, sizes: Sequence[int]) -> int | None:
    """The smallest of the sizes that the heads of a model can be given by zeros; None: there is none.

    Args:
        config: Of the text model.
        sizes: That the kernels know.
    """
    size = head_size(config)
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if config.model_type not in ARCHITECTURES or rope != "default":
        return None
    return min((x for x in sizes if x >= size and x % size == 0), default=None)


def widened(weights: Iterator[tuple[str, Tensor]], size: int, wide: int) -> Iterator[tuple[str, Tensor]]:
    """The weights of the same model with wider heads.

    Args:
        weights: Names and tensors of a Llama-like model.
        size: d, features of a head.
        wide: D, a multiple of it.
    """
    times = wide // size
    places = [i * times for i in range(size // 2)]
    places += [wide // 2 + i for i in places]
    for name, weight in weights:
        kind = name.split(".")[-2] if "." in name else name
        if kind in ("q_proj", "k_proj", "v_proj"):
            heads = weight.unflatten(0, (-1, size))  # [heads, d, ...]
            spread = heads.new_zeros(len(heads), wide, *heads.shape[2:])
            spread[:, places] = heads * times**0.5 if kind == "q_proj" else heads
            weight = spread.flatten(0, 1)
        elif kind == "o_proj" and weight.ndim == 2:
            heads = weight.unflatten(1, (-1, size))  # [H, heads, d]
            spread = heads.new_zeros(len(heads), heads.shape[1], wide)
            spread[..., places] = heads
            weight = spread.flatten(1, 2)
        yield name, weight
