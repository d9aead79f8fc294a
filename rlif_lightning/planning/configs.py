"""A model's config.json: from its folder, the cache, the hub, or a small table. Never its weights."""

import copy
from functools import partial
from typing import Any

from rlif_lightning.models.hub import from_hub, is_local, local_folder
from rlif_lightning.toy import parse_toy_name, toy_model

QWEN2: dict[str, Any] = {"model_type": "qwen2"}
QWEN3: dict[str, Any] = {"model_type": "qwen3", "head_dim": 128}
LLAMA: dict[str, Any] = {"model_type": "llama"}
SIZES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
    "vocab_size", "tie_word_embeddings",
)  # fmt: skip
FIGURES: dict[str, tuple[Any, ...]] = {
    "Qwen/Qwen2.5-0.5B": (QWEN2, 896, 24, 14, 2, 4864, 151936, True),
    "Qwen/Qwen2.5-1.5B": (QWEN2, 1536, 28, 12, 2, 8960, 151936, True),
    "Qwen/Qwen2.5-3B": (QWEN2, 2048, 36, 16, 2, 11008, 151936, True),
    "Qwen/Qwen2.5-7B": (QWEN2, 3584, 28, 28, 4, 18944, 152064, False),
    "Qwen/Qwen2.5-14B": (QWEN2, 5120, 48, 40, 8, 13824, 152064, False),
    "Qwen/Qwen3-0.6B": (QWEN3, 1024, 28, 16, 8, 3072, 151936, True),
    "Qwen/Qwen3-1.7B": (QWEN3, 2048, 28, 16, 8, 6144, 151936, True),
    "Qwen/Qwen3-4B": (QWEN3, 2560, 36, 32, 8, 9728, 151936, True),
    "Qwen/Qwen3-8B": (QWEN3, 4096, 36, 32, 8, 12288, 151936, False),
    "Qwen/Qwen3-14B": (QWEN3, 5120, 40, 40, 8, 17408, 151936, False),
    "meta-llama/Llama-3.2-1B": (LLAMA, 2048, 16, 32, 8, 8192, 128256, True),
    "meta-llama/Llama-3.2-3B": (LLAMA, 3072, 28, 24, 8, 8192, 128256, True),
    "meta-llama/Llama-3.1-8B": (LLAMA, 4096, 32, 32, 8, 14336, 128256, False),
}
"""Sizes of models that recipes name. Only plans use them: weights bring their own config.json."""


def model_config(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The configuration of a model, without its weights: the toy's, of a folder, or of a hub name.

    A folder's or a cached config.json wins over the table, and the table over asking the hub.
    """
    from transformers import AutoConfig

    source = str(toy_model(name)) if parse_toy_name(name) is not None else name
    load = partial(AutoConfig.from_pretrained, trust_remote_code=trust_remote_code)
    if is_local(source):
        folder = local_folder(source)
        return from_hub("model", source, lambda: load(str(folder)))
    try:
        return load(name, revision=revision, local_files_only=True)
    except (OSError, ValueError):
        return known_config(name) or from_hub("model", name, lambda: load(name, revision=revision))


def known_config(name: str) -> Any | None:
    """The configuration of a model in the table; variants (-Base, -Instruct) have the same sizes."""
    from transformers import AutoConfig

    figures = FIGURES.get(name) or FIGURES.get(name.removesuffix("-Base").removesuffix("-Instruct"))
    if figures is None:
        return None
    kind, *sizes = figures
    return AutoConfig.for_model(**kind, **dict(zip(SIZES, sizes, strict=True)))


def with_layers(config: Any, layers: int) -> Any:
    """The configuration with its first layers only, or with some of them again."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = (text.layer_types * layers)[:layers]
    return config
