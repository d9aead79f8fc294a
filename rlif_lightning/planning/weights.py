"""Weights of a policy, counted on a model without memory: how many, in which precision, how many of them train."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import nn

from rlif_lightning.models.lm_head import body_and_head
from rlif_lightning.planning.dry_run import meta_policy
from rlif_lightning.planning.settings import Network, Settings

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


def count_weights(settings: Settings) -> Weights:
    """Count the weights of a recipe's policy."""
    return _count(replace(settings.network, gradient_checkpointing=False), settings.quantization)


@cache
def _count(network: Network, quantization: str | None) -> Weights:
    model: Any = meta_policy(network)
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = body_and_head(model)[1]
    embedding = base.get_input_embeddings().weight
    output: Any = getattr(head.module, "base_layer", head.module).weight  # with or without an adapter around it
    own = [p for n, p in model.named_parameters() if "lora_" not in n]
    adapter = [p for n, p in model.named_parameters() if "lora_" in n]
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    layers = [m for n, m in base.named_modules() if isinstance(m, nn.Linear) and "lora_" not in n]
    layers = [m for m in layers if m.weight is not embedding]
    linear = {p for layer in layers for p in layer.parameters(recurse=False)}  # biases too
    body = {m.weight for m in layers if m.weight is not output}
    size, packed = sum(w.numel() for w in body), body if quantization else set()
    return Weights(
        parameters=sum(p.numel() for p in own),
        trainable=sum(trained),
        loaded=int(sum(p.numel() * (NF4_BITS / 8 if p in packed else p.element_size()) for p in own)),
        adapter=sum(p.nbytes for p in adapter),
        frozen_copy=sum(p.numel() * (network.made if p in linear else p.element_size()) for p in own),
        casts=size * 2 if network.lora is None and network.half is not None else 0,
        body=size,
        head=output.numel(),
        head_trains=output.requires_grad,
        head_casts=network.half is not None and output.element_size() > 2,
        head_is_weight=head.weight is not None,
        tied=output is embedding,
        largest=max(w.numel() for w in body),
        largest_trainable=max(trained),
    )


def optimizer_memory(make: Callable[[Any], torch.optim.Optimizer]) -> tuple[float, bool]:
    """Bytes of state per trainable number, measured by one step with a small weight on the CPU.

    And whether the optimiser is one of torch's that on a GPU works on all weights together, with a copy of their
    size (``foreach``).
    """
    weight = nn.Parameter(torch.zeros(256, 256, device="cpu", dtype=torch.float32))
    weight.grad = torch.ones_like(weight)
    made = make([weight])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # paged optimisers are none on a CPU; the size is the same
        made.step()
    kept = [t for state in made.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    size = sum(t.nbytes for t in kept if t.numel() > 1) / weight.numel()
    one_by_one = made.defaults.get("fused") or made.defaults.get("foreach") is False
    return size, type(made).__module__.startswith("torch.optim") and not one_by_one
