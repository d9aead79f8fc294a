"""Forward and backward of a few decoder layers on tensors without memory: what activations take, layer by layer.

No formula of ours could know which inputs the layers of an architecture keep, under which precision, with or without
an adapter; running the real code on fake tensors does. That takes a fraction of a second, whatever their size.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from rlif_lightning.models.hub import meta_model
from rlif_lightning.planning.configs import with_layers
from rlif_lightning.planning.tracker import Alive

Result = TypeVar("Result")
LAYERS = (2, 3)  # of the dry runs


@dataclass(frozen=True)
class Network:
    """What decides about a policy's forward, beside its batch."""

    config: Any
    half: torch.dtype | None  # of autocast; None: none
    base: torch.dtype  # of the weights that are loaded
    lora: dict[str, Any] | None = None
    gradient_checkpointing: bool = False
    attn_implementation: str | None = None
    caches_casts: bool = True  # autocast keeps its copies of weights; not of sharded ones
    trust_remote_code: bool = False

    @property
    def key(self) -> str:
        """Equal for equal networks."""
        own = (self.half, self.base, self.gradient_checkpointing, self.attn_implementation, self.caches_casts)
        return f"{own} {json.dumps(self.lora, default=str)} {self.config.to_json_string(use_diff=False)}"

    def autocast(self) -> AbstractContextManager[Any]:
        """The Trainer's precision."""
        return (
            nullcontext() if self.half is None else torch.autocast("cpu", self.half, cache_enabled=self.caches_casts)
        )


@dataclass(frozen=True)
class Batch:
    """Rows of one forward; all as long as they may be."""

    rows: int
    prompts: int  # distinct prompts among the rows
    prompt_tokens: int
    completion_tokens: int

    @property
    def shares(self) -> bool:
        """Whether a prompt serves several rows."""
        return self.prompts < self.rows


class Activations(NamedTuple):
    """Bytes of one forward and its backward of a body with all layers, gradients of earlier slices left out."""

    kept: int = 0
    """Alive after the forward, the autocast's copies of weights among them."""
    forward: int = 0
    """At the forward's peak."""
    kept_backward: int = 0
    """Alive when the backward begins, after the autocast has let go of what nobody needs."""
    backward: int = 0
    """At the backward's peak."""


@contextmanager
def fake() -> Iterator[None]:
    """Tensors have shapes and no memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.random.fork_rng(devices=[]), FakeTensorMode():
        yield


def build(network: Network, layers: int | None = None) -> nn.Module:
    """The policy with its adapter on the meta device, which counts and computes nothing; some layers, or all."""
    from rlif_lightning.models.lora import add_lora

    config = network.config if layers is None else with_layers(network.config, layers)
    model = meta_model(
        config,
        trust_remote_code=network.trust_remote_code,
        dtype=network.base,
        attn_implementation=network.attn_implementation,
    ).eval()
    with torch.device("meta"):
        if network.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model if network.lora is None else add_lora(model, network.lora)


def _pretend(model: nn.Module) -> nn.Module:
    """From the meta device to one that casts and attends like the CPU, without memory; within :func:`fake`."""
    made: dict[nn.Parameter, nn.Parameter] = {}  # tied weights stay tied
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight not in made:
                made[weight] = nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype), weight.requires_grad)
            setattr(module, name, made[weight])
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
    return model


def remembered(function: Callable[..., Result]) -> Callable[..., Result]:
    """The same answer for an equal network and other arguments: variants of a plan share much."""
    known: dict[Any, Result] = {}

    @wraps(function)
    def ask(network: Network, *rest: Any) -> Result:
        key = (network.key, *rest)
        if key not in known:
            known[key] = function(network, *rest)
        return known[key]

    return ask


@remembered
def update(network: Network, batch: Batch) -> Activations:
    """Activations of one slice of an update."""
    return _extrapolated(network, *(_update(network, batch, n) for n in LAYERS))


@remembered
def forward(network: Network, batch: Batch, frozen: bool = False) -> Activations:
    """Peak of a forward without gradient, the prompts' keys and values among it where they are shared.

    Args:
        network: The policy.
        batch: Its rows; without completion tokens only the prompts are read.
        frozen: The model is a frozen copy, whose linear layers have half precision.
    """
    return _extrapolated(network, *(_forward(network, batch, n, frozen) for n in LAYERS))


@remembered
def cache_bytes_per_token(network: Network) -> tuple[int, int]:
    """Of one token in the sampler's cache, all layers: keys, and values. They may differ in precision."""
    layers = network.config.get_text_config().num_hidden_layers
    model = build(network, 1)
    with fake():
        kept = _read(_pretend(model), network, Batch(1, 1, 1, 0)).preallocated[0]
        keys, values = (layers * x[:, :, :1].numel() * x.element_size() for x in (kept.keys, kept.values))
    return keys, values


def _extrapolated(network: Network, few: Activations, more: Activations) -> Activations:
    """From two and three layers to all: each layer adds as much."""
    beyond = network.config.get_text_config().num_hidden_layers - LAYERS[0]
    return Activations(*(a + beyond * (b - a) for a, b in zip(few, more, strict=True)))


def _update(network: Network, batch: Batch, layers: int) -> Activations:
    from rlif_lightning.models.policy import set_training_mode

    model = build(network, layers)
    with fake():
        model = _pretend(model)
        set_training_mode(model, training=True)
        for weight in model.parameters():  # as in all slices but the first
            weight.grad = torch.empty_like(weight) if weight.requires_grad else None
        with Alive() as alive:
            with network.autocast():
                chosen = _hidden(model, batch, network)
                kept, peak = alive.now, alive.peak
            kept_backward = alive.peak = alive.now
            chosen.backward(torch.empty_like(chosen))
        return Activations(kept, peak, kept_backward, alive.peak)


def _forward(network: Network, batch: Batch, layers: int, frozen: bool) -> Activations:
    model = build(network, layers)
    with fake():
        model = _pretend(model).requires_grad_(False)
        if frozen and network.half is not None:
            for layer in model.modules():
                if isinstance(layer, nn.Linear):  # not .to(): fake weights cannot be swapped in place
                    for name, weight in list(layer.named_parameters(recurse=False)):
                        setattr(layer, name, nn.Parameter(weight.to(network.half), requires_grad=False))
        with torch.no_grad(), network.autocast(), Alive() as alive:
            out = _hidden(model, batch, network) if batch.completion_tokens else _read(model, network, batch)
            kept, peak = alive.now, alive.peak
        del out
    return Activations(kept, peak)


def _read(model: nn.Module, network: Network, batch: Batch) -> Any:
    """Prompts go through the model once, as the sampler sends them; their cache."""
    from rlif_lightning.sampling.kv_cache import PreallocatedCache

    cache = PreallocatedCache(model.config.get_text_config().num_hidden_layers)  # type: ignore[operator, union-attr]
    with torch.no_grad(), network.autocast():
        _body(model)(
            input_ids=torch.zeros(batch.prompts, batch.prompt_tokens, dtype=torch.long),
            attention_mask=torch.ones(batch.prompts, batch.prompt_tokens, dtype=torch.long),
            past_key_values=cache,
            use_cache=True,
        )
    return cache


def _body(model: Any) -> Any:
    from rlif_lightning.models.lm_head import body_and_head

    return body_and_head(model)[0]


def _hidden(model: Any, batch: Batch, network: Network) -> Tensor:
    """As :func:`rlif_lightning.models.scoring.completion_hidden`, then the rows [M, H] that the head is given.

    Embeddings come from outside: the gradient of theirs is one tensor, which the caller counts.
    """
    from transformers import DynamicCache

    body = _body(model)
    embedding = model.get_input_embeddings().weight
    start, tokens = batch.prompt_tokens, batch.completion_tokens

    def embedded(rows: int, length: int) -> Tensor:
        empty = torch.empty(rows, length, embedding.shape[1], dtype=embedding.dtype)
        return empty.requires_grad_(embedding.requires_grad and torch.is_grad_enabled())

    def run(rows: int, length: int, before: int, **cache: Any) -> Tensor:
        place = torch.arange(before, before + length)[None].expand(rows, length)
        mask = torch.ones(rows, before + length, dtype=torch.long)
        out: Tensor = body(
            inputs_embeds=embedded(rows, length), attention_mask=mask, position_ids=place, **cache
        ).last_hidden_state
        return out

    if not batch.shares:
        hidden = run(batch.rows, start + tokens - 1, 0, use_cache=False)[:, start - 1 :]
    else:
        cache: Any = DynamicCache()
        group = torch.arange(batch.rows) * batch.prompts // batch.rows
        once = run(batch.prompts, start, 0, past_key_values=cache, use_cache=True)[:, -1:]
        hidden = once[group]
        if tokens > 1:
            cache.batch_select_indices(group)
            rest = run(batch.rows, tokens - 1, start, past_key_values=cache, use_cache=True)
            hidden = torch.cat([hidden, rest], 1)
    return hidden.flatten(0, 1).index_select(0, torch.arange(batch.rows * tokens))
