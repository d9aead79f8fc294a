"""A policy's weights as another engine loads them: plain matrices under the names of its checkpoint."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from rlif_lightning.errors import UserError
from rlif_lightning.models.merging import is_adapted


def merged_weights(policy: Any) -> Iterator[tuple[str, Tensor]]:
    """A policy's weights by name, detached, LoRA merged in and 4-bit matrices unpacked; the policy stays as it is.

    One matrix exists at a time: W + BA (or its DoRA form) is computed in float32 and belongs to the caller, weights
    that are dense already are the policy's own. Tied weights come once under each of their names. Refused are
    adapters that are no LoRA or that no single matrix can express, and a policy cut into shards.
    """
    return _weights(policy.get_base_model() if hasattr(policy, "get_base_model") else policy, "")


def _weights(module: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    if is_adapted(module):
        yield from _adapted(module, prefix)
        return
    for name, weight in module.named_parameters(recurse=False):
        yield prefix + name, _unpacked(weight)
    for name, child in module.named_children():
        yield from _weights(child, f"{prefix}{name}.")


def _adapted(module: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """The weights of a module under an adapter."""
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import ModulesToSaveWrapper

    if isinstance(module, ModulesToSaveWrapper):
        names = [] if module.disable_adapters else list(module.active_adapters)
        yield from _weights(module.modules_to_save[names[0]] if names else module.original_module, prefix)
        return
    if not isinstance(module, LoraLayer):
        raise UserError(
            "Another engine can't take this kind of adapter",
            got=f"{type(module).__name__} at {prefix.rstrip('.')}",
            expected="LoRA or DoRA",
            do="leave rollout.sampler out: the native sampler runs the policy itself",
        )
    for name, weight in module.get_base_layer().named_parameters(recurse=False):
        yield prefix + name, _merged(module, weight) if name == "weight" else weight.detach()


@torch.no_grad()
def _merged(layer: Any, weight: Tensor) -> Tensor:
    """Base weight with the active adapters in it, in float32."""
    merged = _unpacked(weight).float()
    if layer.merged or layer.disable_adapters:
        return merged
    for adapter in layer.active_adapters:
        if adapter not in layer.scaling:
            continue
        variant = layer.lora_variant.get(adapter)
        try:
            if any(layer.lora_bias.values()):
                raise RuntimeError("lora_bias adds a bias")
            if variant is None:
                merged = merged + layer.get_delta_weight(adapter).float()
            else:
                merged = variant.merge_safe(layer, adapter, merged)
                layer._caches.clear()  # kept by peft for a merge in place that is undone later
        except (RuntimeError, NotImplementedError) as error:
            raise UserError(
                "Another engine can't take this adapter: no single matrix expresses it",
                got=str(error) or type(variant).__name__,
                do="leave rollout.sampler out: the native sampler runs the policy itself",
            ) from error
    return merged


def _unpacked(weight: Tensor) -> Tensor:
    """A weight as a plain matrix."""
    if isinstance(weight, DTensor):
        raise UserError(
            "Another engine needs whole weights, and this policy is cut into shards",
            do="leave rollout.sampler out, or use one process or --trainer.strategy ddp",
        )
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight.detach()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, state)
