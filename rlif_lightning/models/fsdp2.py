"""A policy whose weights, gradients and optimiser states all processes share (FSDP2).

Between two updates every process holds its share of each weight only. An update gathers one decoder layer after
another. Whatever needs no gradient (generation, scores of references) runs on a plain copy of the module,
:class:`GatheredPolicy`, whose weights are gathered for as long as it is used: processes whose completions differ in
length then never wait for each other within a token.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial, wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from rlif_lightning.functional.cast_linear import cast_linear
from rlif_lightning.models.lora import adapter_off
from rlif_lightning.models.references import ReferenceKind, References, linear_weights
from rlif_lightning.models.trainable import gather

Function = TypeVar("Function", bound=Callable[..., Any])


def is_sharded(model: nn.Module) -> bool:
    """Whether processes share the model's weights out."""
    return isinstance(model, FSDPModule)


def shard(policy: Any, mesh: DeviceMesh) -> nn.Module:
    """Share the weights of a policy out over a mesh [processes], in place: layer by layer, then all that is left."""
    model = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
    for layer in model.get_decoder().layers:
        cast_linear(layer)  # copies kept for the backward pass would be as many as if nothing were shared out
        fully_shard(layer, mesh=mesh)
    fully_shard(policy, mesh=mesh)
    policy.shares_prompts = False
    policy.run_inside = lambda function: function()
    register_fsdp_forward_method(policy, "run_inside")
    return policy


def runs_inside(function: Function) -> Function:
    """Let a function that uses the parts of its first argument, a policy, count as the policy's forward.

    Where weights are shared out, embedding, final norm and head are whole within it, and the gradients of all weights
    find their way back to the shares. Every process has to call the layers the same number of times.
    """

    @wraps(function)
    def wrapped(policy: Any, *args: Any, **kwargs: Any) -> Any:
        call = partial(function, policy, *args, **kwargs)
        return policy.run_inside(call) if is_sharded(policy) else call()

    return cast(Function, wrapped)


class GatheredPolicy:
    """A sharded policy in one piece: a plain module whose weights are gathered for as long as it is in use.

    Made before the policy is sharded. The linear layers' weights get the dtype of autocast, which would round them
    alike for every token.
    """

    def __init__(self, policy: Any, device: torch.device, dtype: torch.dtype) -> None:
        empty = {id(p): nn.Parameter(p.detach().new_empty(0), requires_grad=False) for p in policy.parameters()}
        self.model: Any = copy.deepcopy(policy, empty).eval().to(device)
        self.model.shares_prompts = False
        self.rounded = linear_weights(policy) if dtype != torch.float32 else set()
        self.dtype = dtype
        self._in_place: str | None = None  # the name of the weights in place

    @contextmanager
    def holding(self, name: str, weights: Mapping[str, Tensor]) -> Iterator[nn.Module]:
        """The module with these weights, without gradients. To be entered and left on all processes together.

        Weights that were in place before are gone afterwards, if they were others: whoever needs them enters again.
        The same name means the same shares: where their weights are in place already, nothing is gathered.
        """
        if self._in_place == name:
            yield self.model
            return
        self._fill(name, weights)
        try:
            yield self.model
        finally:
            self._fill(None, {})

    @torch.no_grad()
    def _fill(self, which: str | None, weights: Mapping[str, Tensor]) -> None:
        for name, own in self.model.named_parameters():
            own.data = own.new_empty(0)  # first let go, then gather
            if which is not None:
                weight = weights[name].detach()
                own.data = gather(weight.to(self.dtype) if name in self.rounded else weight)
        torch.clear_autocast_cache()
        self._in_place = which

    def current(self, policy: nn.Module) -> AbstractContextManager[nn.Module]:
        """The policy as it is now."""
        return self.holding("policy", dict(policy.named_parameters()))

    @contextmanager
    def reference(self, kind: ReferenceKind, references: References, policy: nn.Module) -> Iterator[nn.Module]:
        """One of its references; see :meth:`~rlif_lightning.models.references.References.using`."""
        snapshot: Any = dict(references.snapshots).get(kind, references.frozen)
        if snapshot is None:
            with self.current(policy) as model, adapter_off(model):
                yield model
        else:
            weights = dict(policy.named_parameters()) | dict(zip(snapshot.names, snapshot.weights, strict=True))
            with self.holding(kind, weights) as model:
                yield model
