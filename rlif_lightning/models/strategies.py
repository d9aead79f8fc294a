"""The strategy that shares weights, gradients and optimiser states out (FSDP2), and those that are refused."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
    StrategyRegistry,
)
from torch import Tensor
from torch.optim import Optimizer

from rlif_lightning.errors import UserError, check_ranges
from rlif_lightning.models.trainable import gather_all, shard_like, trainable, write_shard


class FSDP2Strategy(ModelParallelStrategy):
    """``trainer.strategy: fsdp2``: every process has its own prompts and its share of all weights.

    Lightning's ModelParallelStrategy with all processes in the data-parallel group, where the stock defaults put
    all devices of a node into a tensor-parallel group. A checkpoint is one file, the same as without
    sharding: a run continues with any strategy and any number of processes. Its settings are Lightning's
    ``process_group_backend`` and ``timeout``.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, **settings)

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
            of_number = dict(zip(numbers, weights, strict=True))
            shares = {n: _shares(of_number[n], values) for n, values in stored["state"].items()}
            optimizer.load_state_dict({**stored, "state": shares})


def _shares(weight: Tensor, state: Mapping[str, Any]) -> dict[str, Any]:
    """This process's share of a weight's optimiser state; what has another shape than the weight stays whole."""
    own = {key: v for key, v in state.items() if isinstance(v, Tensor) and v.shape == weight.shape}
    return {**state, **{key: shard_like(weight, values) for key, values in own.items()}}


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="Weights and optimiser states shared out by FSDP2")


def check_strategy(name: str) -> None:
    """Refuse strategies that can't work here, by their short name, class or class path."""
    kind = name.rsplit(".", 1)[-1].lower()
    if kind.startswith("deepspeed"):
        wrong = "DeepSpeed is not supported"
    elif kind == "modelparallelstrategy":
        wrong = "Tensor parallelism, the default of ModelParallelStrategy within a node, is not supported"
    elif kind.startswith("fsdp") and not kind.startswith("fsdp2"):
        wrong = "The first FSDP is not supported: it can't sample from sharded weights, nor start without a GPU"
    else:
        return
    raise UserError(wrong, got=f"trainer.strategy {name}", do="set --trainer.strategy fsdp2")


def shares_out(strategy: Strategy | None) -> bool:
    """Whether a strategy lets each process hold a share of the weights only: FSDP2, and those that are refused."""
    return isinstance(strategy, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy)


def check_optimizer(optimizer: Optimizer, trainer: Trainer) -> None:
    """Refuse an optimiser that can't work on shares, or that unscales gradients itself where a Trainer clips them."""
    if isinstance(trainer.strategy, FSDP2Strategy) and type(optimizer).__module__.startswith("bitsandbytes"):
        raise UserError(
            "The optimisers of bitsandbytes can't work on weights that processes share out",
            got=type(optimizer).__name__,
            do="set --model.optimizer torch.optim.AdamW, or --trainer.strategy ddp",
        )
    if isinstance(trainer.strategy, FSDP2Strategy) and trainer.precision == "16-mixed":
        raise UserError(
            "float16 needs a gradient scaler, which has not been tried on weights that processes share out",
            got="trainer.precision 16-mixed with trainer.strategy fsdp2",
            do="set --trainer.precision bf16-mixed, or --trainer.strategy ddp",
        )
    mixed, clip = str(trainer.precision).endswith("-mixed"), trainer.gradient_clip_val
    check_ranges("trainer", ("gradient_clip_val", clip, clip is None or clip >= 0, "0 or more, or null: no clipping"))
    if clip and mixed and getattr(optimizer, "_step_supports_amp_scaling", False):
        raise UserError(
            "A fused optimizer does not let gradients be clipped in mixed precision",
            got=f"trainer.precision {trainer.precision}, trainer.gradient_clip_val {clip}",
            do="leave out the optimizer's fused, or set --trainer.gradient_clip_val null",
        )
