"""Weights, gradients and optimiser states shared out over all processes (FSDP2), and the strategy that does it.

Between two updates every process holds its share of each weight only. An update gathers one decoder layer after
another. Whatever needs no gradient (generation, scores of other versions) runs on a plain copy of the module,
:class:`Whole`, whose weights are gathered for as long as it is used: processes whose completions differ in length
then never wait for each other within a token.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
    StrategyRegistry,
)
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.optim import Optimizer

from rlif_lightning.errors import UserError
from rlif_lightning.functional.cast_linear import cast_linear
from rlif_lightning.models.lora import adapter_off
from rlif_lightning.models.policy import linear_weights
from rlif_lightning.models.references import ReferenceKind, References
from rlif_lightning.models.trainable import gather, gather_all, shard_like, trainable, write_shard

P = ParamSpec("P")
T = TypeVar("T")


class FSDP2Strategy(ModelParallelStrategy):
    """``trainer.strategy: fsdp2``: every process has its own prompts and its share of all weights.

    Lightning's ModelParallelStrategy with all processes in the data-parallel group, where the stock defaults put
    all devices of a node into a tensor-parallel group. A checkpoint is one file, the same as without
    sharding: a run goes on with any strategy and any number of processes.

    Args:
        process_group_backend: gloo, nccl ...; null: that of the device.
        timeout: After which a process that waits for another gives up.
    """

    def __init__(
        self, process_group_backend: str | None = None, timeout: timedelta | None = default_pg_timeout
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    def setup_environment(self) -> None:
        """All processes of all nodes share the weights."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @property
    def lightning_restore_optimizer(self) -> bool:
        """As with strategies that share nothing out."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The trainable weights, whole; on the first process only. To be called on all."""
        assert self.lightning_module is not None
        return gather_all(trainable(self.lightning_module), keep=self.is_global_zero)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimiser's state, whole; on the first process only. To be called on all."""
        state = getattr(optimizer, "optimizer", optimizer).state_dict()
        states = {number: gather_all(own, keep=self.is_global_zero) for number, own in state["state"].items()}
        return {**state, "state": states}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """One file, written by the first process."""
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read the file on every process."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Each process takes its share."""
        assert self.lightning_module is not None
        own = dict(self.lightning_module.named_parameters())
        for name, weight in checkpoint["state_dict"].items():
            write_shard(own[name], weight)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Each process takes its share."""
        for optimizer, stored in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            numbers = [n for group in stored["param_groups"] for n in group["params"]]
            weights = [p for group in optimizer.param_groups for p in group["params"]]
            shares = {
                n: {
                    key: shard_like(w, v) if isinstance(v, Tensor) and v.shape == w.shape else v
                    for key, v in stored["state"][n].items()
                }
                for n, w in zip(numbers, weights, strict=True)
                if n in stored["state"]
            }
            optimizer.load_state_dict({**stored, "state": shares})


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="Weights and optimiser states shared out by FSDP2")


def check_strategy(name: str) -> None:
    """Refuse strategies that can't work here.

    Args:
        name: As ``trainer.strategy`` names it: a short name, a class or its path.

    Raises:
        UserError: FSDP1, DeepSpeed, or Lightning's own ModelParallelStrategy.
    """
    kind = name.rsplit(".", 1)[-1].lower()
    if kind.startswith("deepspeed"):
        raise UserError(
            "DeepSpeed is not supported", got=f"trainer.strategy {name}", do="set --trainer.strategy fsdp2"
        )
    if kind == "modelparallelstrategy":
        raise UserError(
            "Tensor parallelism is not supported, and ModelParallelStrategy puts the devices of a node into it "
            "by default",
            got=f"trainer.strategy {name}",
            do="set --trainer.strategy fsdp2, which is the same with every device in data_parallel_size",
        )
    if kind.startswith("fsdp") and not kind.startswith("fsdp2"):
        raise UserError(
            "The first FSDP is not supported: it can't sample from sharded weights, nor start without a GPU",
            got=f"trainer.strategy {name}",
            do="set --trainer.strategy fsdp2",
        )


def shares_out(strategy: Strategy | None) -> bool:
    """Whether a strategy lets each process hold a share of the weights only: FSDP2, and those that are refused."""
    return isinstance(strategy, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy)


def check_sharding(optimizer: Optimizer) -> None:
    """Refuse an optimiser that can't work on shares.

    Raises:
        UserError: One of bitsandbytes.
    """
    if type(optimizer).__module__.startswith("bitsandbytes"):
        raise UserError(
            "The optimisers of bitsandbytes can't work on weights that processes share out",
            got=type(optimizer).__name__,
            do="set --model.optimizer torch.optim.AdamW, or --trainer.strategy ddp",
        )


def is_sharded(model: nn.Module) -> bool:
    """Whether processes share the model's weights out."""
    return isinstance(model, FSDPModule)


def shard(policy: Any, mesh: DeviceMesh) -> nn.Module:
    """Share the weights of a policy out, in place: each decoder layer by itself, then all that is left.

    Args:
        policy: Loaded, the same on every process.
        mesh: [processes].
    """
    model = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
    for layer in model.get_decoder().layers:
        cast_linear(layer)  # copies kept for the backward pass would be as many as if nothing were shared out
        fully_shard(layer, mesh=mesh)
    fully_shard(policy, mesh=mesh)
    policy.shares_prompts = False
    policy.run_inside = lambda function: function()
    register_fsdp_forward_method(policy, "run_inside")
    return policy


def shares_prompts(model: nn.Module) -> bool:
    """Whether a model may compute a prompt once for all its completions.

    Not a sharded one: whether it takes one call of the layers or two would depend on the completions of a process,
    while the others wait for it at each layer.
    """
    return getattr(model, "shares_prompts", True)


def runs_inside(function: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    """Let a function that uses the parts of its first argument, a policy, count as the policy's forward.

    Where weights are shared out, embedding, final norm and head are whole within it, and the gradients of all weights
    find their way back to the shares. Every process has to call the layers the same number of times.
    """

    @wraps(function)
    def wrapped(policy: Any, *args: P.args, **kwargs: P.kwargs) -> T:
        call = partial(function, policy, *args, **kwargs)
        result: T = policy.run_inside(call) if is_sharded(policy) else call()
        return result

    return wrapped


class FrozenShares(nn.Module):
    """The shares of a policy's weights as they are now, its linear layers in a given dtype.

    Args:
        policy: Sharded.
        dtype: See :func:`~rlif_lightning.models.policy.frozen_copy`.
    """

    def __init__(self, policy: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        rounded = linear_weights(policy)
        self.names = [name for name, _ in policy.named_parameters()]
        self.weights = nn.ParameterList(
            nn.Parameter(p.detach().clone().to(dtype if name in rounded else p.dtype), requires_grad=False)
            for name, p in policy.named_parameters()
        )


class GatheredPolicy:
    """A sharded policy in one piece: a plain module whose weights are gathered for as long as it is in use.

    Args:
        policy: To be sharded afterwards.
        device: Of this process.
        dtype: Of the linear layers' weights: that of autocast, which would round them alike for every token.
    """

    def __init__(self, policy: Any, device: torch.device, dtype: torch.dtype) -> None:
        empty = {id(p): nn.Parameter(p.detach().new_empty(0), requires_grad=False) for p in policy.parameters()}
        self.model: Any = copy.deepcopy(policy, empty).eval().to(device)
        self.model.shares_prompts = False
        self.rounded = linear_weights(policy) if dtype != torch.float32 else set()
        self.dtype = dtype
        self._present: str | None = None  # the name of the weights in place

    @contextmanager
    def at(self, name: str, weights: Mapping[str, Tensor]) -> Iterator[nn.Module]:
        """The module with these weights, without gradients. To be entered and left on all processes together.

        Weights that were in place before are gone afterwards, if they were others: whoever needs them enters again.

        Args:
            name: The same name means the same weights: where they are in place already, nothing is gathered.
            weights: Shares, by the names of the policy's parameters.
        """
        if self._present == name:
            yield self.model
            return
        self._put(name, weights)
        try:
            yield self.model
        finally:
            self._put(None, {})

    @torch.no_grad()
    def _put(self, present: str | None, weights: Mapping[str, Tensor]) -> None:
        for name, own in self.model.named_parameters():
            own.data = own.new_empty(0)  # first let go, then gather
            if present is not None:
                weight = weights[name].detach()
                own.data = gather(weight.to(self.dtype) if name in self.rounded else weight)
        torch.clear_autocast_cache()
        self._present = present

    def policy(self, policy: nn.Module) -> Any:
        """The present policy."""
        return self.at("policy", dict(policy.named_parameters()))

    @contextmanager
    def version(self, which: ReferenceKind, versions: References, policy: nn.Module) -> Iterator[nn.Module]:
        """Another version of the policy; see :meth:`~rlif_lightning.models.references.Versions.at`."""
        weights: dict[str, Tensor] = dict(policy.named_parameters())
        if which in versions.snapshots:
            snapshot: Any = versions.snapshots[which]
            weights |= dict(zip(trainable(policy), snapshot.weights, strict=True))
        elif isinstance(versions.frozen, FrozenShares):
            weights = dict(zip(versions.frozen.names, versions.frozen.weights, strict=True))
        else:
            with self.policy(policy) as model, adapter_off(model):
                yield model
            return
        with self.at(which, weights) as model:
            yield model
