"""Weights of a policy, counted on a model without memory: how many, in which precision, how many of them train."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from rlif_lightning.planning.dry_run import Network, build, remembered
from rlif_lightning.planning.settings import Settings

NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""Of a weight: 4 bits, and an 8-bit scale per block of 64, and a 32-bit one per 256 of those."""


@dataclass(frozen=True)
class Weights:
    """Of the whole model, in numbers and bytes."""

    parameters: int  # of the model without an adapter
    trainable: int
    loaded: int  # bytes of the weights without the adapter
    adapter: int  # bytes
    frozen_copy: int  # bytes of a frozen copy of all weights
    casts: int  # bytes of the linear layers of the body in half precision, where they are trained in full
    body: int  # numbers of the body's linear layers
    head: int  # numbers
    head_trains: bool
    head_casts: bool  # full precision under autocast
    head_is_weight: bool
    tied: bool
    largest: int  # numbers of the largest linear layer
    largest_trainable: int


def count(settings: Settings) -> Weights:
    """Count the weights of a recipe's policy."""
    return _count(replace(settings.network, gradient_checkpointing=False), settings.quantization)


@remembered
def _count(network: Network, quantization: str | None) -> Weights:
    model: Any = build(network)
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    from rlif_lightning.models.lm_head import body_and_head

    head = body_and_head(model)[1]
    embedding = base.get_input_embeddings().weight
    output = _weight(head.module)
    own = {n: p for n, p in model.named_parameters() if "lora_" not in n}
    adapter = [p for n, p in model.named_parameters() if "lora_" in n]
    layers = [
        m
        for n, m in base.named_modules()
        if isinstance(m, nn.Linear) and "lora_" not in n and m.weight is not embedding
    ]
    linear = {id(p) for layer in layers for p in layer.parameters(recurse=False)}  # biases too
    body = {id(m.weight): m.weight for m in layers if m.weight is not output}
    half = 2 if network.half is not None else 4
    packed = {id(w) for w in body.values()} if quantization else set()
    loaded = sum(p.numel() * (NF4_BITS / 8 if id(p) in packed else p.element_size()) for p in own.values())
    trains = network.lora is None
    return Weights(
        parameters=sum(p.numel() for p in own.values()),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        loaded=int(loaded),
        adapter=sum(p.numel() * p.element_size() for p in adapter),
        frozen_copy=sum(p.numel() * (half if id(p) in linear else p.element_size()) for p in own.values()),
        casts=sum(w.numel() * 2 for w in body.values()) if trains and network.half is not None else 0,
        body=sum(w.numel() for w in body.values()),
        head=output.numel(),
        head_trains=output.requires_grad,
        head_casts=network.half is not None and output.element_size() > 2,
        head_is_weight=head.weight is not None,
        tied=output is embedding,
        largest=max(w.numel() for w in body.values()),
        largest_trainable=max(p.numel() for p in model.parameters() if p.requires_grad),
    )


def _weight(head: Any) -> nn.Parameter:
    """Of a head, whether an adapter is around it or not."""
    weight: nn.Parameter = getattr(head, "base_layer", head).weight
    return weight


@lru_cache(maxsize=32)
def state_bytes(optimizer: Callable[[Any], torch.optim.Optimizer]) -> float:
    """Bytes that an optimiser keeps per trainable number: it takes a step with a small weight, and we look."""
    weight = nn.Parameter(torch.zeros(256, 256, device="cpu", dtype=torch.float32))
    weight.grad = torch.ones_like(weight)
    made = optimizer([weight])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # paged optimisers are none on a CPU; the size is the same
        made.step()
    kept = [t for state in made.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in kept if t.numel() > 1) / weight.numel()
