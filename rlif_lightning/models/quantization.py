"""Frozen weights in 4 bits (QLoRA, arXiv 2305.14314): what it needs, and what it excludes."""

from typing import Any, Literal

import torch
from torch import nn

from rlif_lightning.errors import UserError

Quantization = Literal["nf4"]


def quantization_config(dtype: torch.dtype) -> Any:
    """NF4 with double quantisation for ``from_pretrained``; products are computed in the given dtype."""
    from transformers import BitsAndBytesConfig

    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    return BitsAndBytesConfig(load_in_4bit=True, **nf4)


def keep_as_quantised(model: nn.Module) -> None:
    """Keep bitsandbytes from packing the weights anew in eval mode, as it does on CPUs that multiply bfloat16.

    Packed weights have other scales, rounded to bfloat16, and no backward pass, while a policy trains in eval mode
    here where dropout is off.
    """
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def check_quantization(device: torch.device, sharded: bool) -> None:
    """Refuse 4-bit weights on a device where they cannot work, and where processes are to share them out."""
    from transformers.utils import is_bitsandbytes_available

    if sharded:
        raise UserError(
            "4-bit weights cannot be cut into shards",
            got="model.quantization with trainer.strategy fsdp2",
            do="set --trainer.strategy ddp, where each process has the whole model, or leave model.quantization out",
        )
    if not is_bitsandbytes_available():
        wrong = "model.quantization needs bitsandbytes, which is missing or too old"
        raise UserError(wrong, expected="version 0.50 or newer", do="pip install -U bitsandbytes")
    import bitsandbytes

    if device.type not in bitsandbytes.supported_torch_devices:
        known = f"one that bitsandbytes knows: {', '.join(sorted(bitsandbytes.supported_torch_devices))}"
        do = "leave model.quantization out"
        raise UserError("4-bit weights do not work on this device", got=device, expected=known, do=do)


def check_trainable(quantization: str | None, adapts: bool, config: Any) -> None:
    """Refuse to train weights that are held in 4 bits without an adapter, or any of a file that is quantised."""
    if quantization is not None and not adapts:
        raise UserError(
            "4-bit weights cannot be trained, only an adapter on them can",
            got=f"model.quantization {quantization} without model.lora and model.adapter",
            do="add --model.lora '{r: 16, target_modules: all-linear}', or leave model.quantization out",
        )
    method = getattr(config, "quantization_config", None)
    if method is not None:
        raise UserError(
            "The model's file holds quantised weights, which has not been tried in training",
            got=method.get("quant_method", method) if isinstance(method, dict) else method,
            do="give the model that it was made from, and model.quantization nf4 for 4 bits",
        )
