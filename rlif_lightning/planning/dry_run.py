"""Forward and backward of a few decoder layers on tensors without memory: what activations take, layer by layer.

No formula of ours could know which inputs the layers of an architecture keep, under which precision, with or without
an adapter; running the real code on fake tensors does. That takes a fraction of a second, whatever their size.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlif_lightning.models.hub import meta_model
from rlif_lightning.models.lm_head import body_and_head
from rlif_lightning.models.lora import add_lora
from rlif_lightning.models.policy import set_training_mode
from rlif_lightning.planning.configs import with_layers
from rlif_lightning.planning.settings import Network
from rlif_lightning.sampling.kv_cache import preallocated_cache

LAYERS = (2, 3)  # of the dry runs


class Batch(NamedTuple):
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

    kept: int  # alive after the forward, the autocast's copies of weights among them
    forward: int  # at the forward's peak
    kept_backward: int = 0  # alive when the backward begins, after the autocast has let go of what nobody needs
    backward: int = 0  # at the backward's peak


class Alive(TorchDispatchMode):
    """Bytes of the storages that were made inside and still live, for tensors without memory as well.

    What a kernel takes and gives back within one operation is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation; count what is new in its result."""
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and id(storage) not in given and storage not in self._seen:  # else a view
                self._seen.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, storage.nbytes())
        return out

    def _gone(self, size: int) -> None:
        self.now -= size


@cache
def update(network: Network, batch: Batch) -> Activations:
    """Activations of one slice of an update."""
    return _extrapolated(network, *(_update(network, batch, n) for n in LAYERS))


@cache
def forward(network: Network, batch: Batch) -> Activations:
    """Peak of a forward without gradient, as of a frozen copy: its linear layers are in half precision.

    Keys and values of prompts that are shared are among it. Without completion tokens only the prompts are read, as
    the sampler sends them.
    """
    return _extrapolated(network, *(_forward(network, batch, n) for n in LAYERS))


def _extrapolated(network: Network, few: Activations, more: Activations) -> Activations:
    """From two and three layers to all: each layer adds as much."""
    beyond = network.layers - LAYERS[0]
    return Activations(*(a + beyond * (b - a) for a, b in zip(few, more, strict=True)))


def _update(network: Network, batch: Batch, layers: int) -> Activations:
    with _fake(meta_policy(network, layers)) as model:
        set_training_mode(model, training=True)
        for weight in model.parameters():  # as in all slices but the first
            weight.grad = torch.empty_like(weight) if weight.requires_grad else None
        with Alive() as alive:
            with network.autocast():
                chosen = _hidden(model, batch)
                kept, peak = alive.now, alive.peak
            kept_backward = alive.peak = alive.now
            chosen.backward(torch.empty_like(chosen))
        return Activations(kept, peak, kept_backward, alive.peak)


def _forward(network: Network, batch: Batch, layers: int) -> Activations:
    frozen = meta_policy(network, layers).requires_grad_(False)
    with _fake(frozen, network.half) as model, torch.no_grad(), network.autocast(), Alive() as alive:
        out = _hidden(model, batch) if batch.completion_tokens else _read(model, batch)
        kept, peak = alive.now, alive.peak
        del out
    return Activations(kept, peak)


def meta_policy(network: Network, layers: int | None = None) -> nn.Module:
    """The policy with its adapter on the meta device, which counts and computes nothing; some layers, or all."""
    model = meta_model(
        network.config if layers is None else with_layers(network.config, layers),
        trust_remote_code=network.trust_remote_code,
        dtype=network.base,
    ).eval()
    with torch.device("meta"):
        if network.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model if network.lora is None else add_lora(model, network.lora)


@contextmanager
def _fake(model: nn.Module, linear: torch.dtype | None = None) -> Iterator[nn.Module]:
    """A model's tensors from the meta device to the CPU without memory, its linear layers in another precision."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    made: dict[Any, nn.Parameter] = {}  # tied weights stay tied
    with torch.random.fork_rng(devices=[]), FakeTensorMode():
        for module in model.modules():
            other = linear if isinstance(module, nn.Linear) else None
            for name, weight in module.named_parameters(recurse=False):
                if (weight, other) not in made:
                    empty = torch.empty(weight.shape, dtype=other or weight.dtype)
                    made[weight, other] = nn.Parameter(empty, weight.requires_grad)
                setattr(module, name, made[weight, other])
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
        yield model


def _read(model: nn.Module, batch: Batch) -> Any:
    """Prompts go through the model once; their cache."""
    body: Any = body_and_head(model)[0]
    cache = preallocated_cache(body)
    ids = torch.zeros(batch.prompts, batch.prompt_tokens, dtype=torch.long)
    body(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True)
    return cache


def _hidden(model: Any, batch: Batch) -> Tensor:
    """As ``models.scoring.completion_hidden``, then the rows [M, H] that the head is given.

    Embeddings come from outside: the gradient of theirs is one tensor, which the caller counts.
    """
    from transformers import DynamicCache

    body: Any = body_and_head(model)[0]
    embedding = model.get_input_embeddings().weight
    start, tokens = batch.prompt_tokens, batch.completion_tokens

    def run(rows: int, length: int, before: int, **cache: Any) -> Tensor:
        embedded = torch.empty(rows, length, embedding.shape[1], dtype=embedding.dtype)
        embedded.requires_grad_(embedding.requires_grad and torch.is_grad_enabled())
        place = torch.arange(before, before + length)[None].expand(rows, length)
        mask = torch.ones(rows, before + length, dtype=torch.long)
        out = body(inputs_embeds=embedded, attention_mask=mask, position_ids=place, **cache)
        return out.last_hidden_state

    if not batch.shares:
        hidden = run(batch.rows, start + tokens - 1, 0, use_cache=False)[:, start - 1 :]
    else:
        cache: Any = DynamicCache()
        group = torch.arange(batch.rows) * batch.prompts // batch.rows
        hidden = run(batch.prompts, start, 0, past_key_values=cache, use_cache=True)[:, -1:][group]
        if tokens > 1:
            cache.batch_select_indices(group)
            rest = run(batch.rows, tokens - 1, start, past_key_values=cache, use_cache=True)
            hidden = torch.cat([hidden, rest], 1)
    return hidden.flatten(0, 1).index_select(0, torch.arange(batch.rows * tokens))
