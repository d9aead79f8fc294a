"""A recipe's settings for a plan: parsed as ``rlif fit`` parses them, without a Trainer for them."""

from typing import Any

from rlif_lightning.cli.recipe_objects import PlainCLI
from rlif_lightning.errors import UserError
from rlif_lightning.models.precision import precision_name
from rlif_lightning.planning.settings import Settings, read_settings


class PlanCLI(PlainCLI):
    """The settings of ``rlif fit``, whatever hardware they are for."""

    def instantiate_trainer(self, **kwargs: Any) -> None:  # type: ignore[override]
        """The settings may name a GPU that this machine does not have: nothing is looked for."""

    def plan_settings(self) -> Settings:
        """What the plan needs of them.

        Raises:
            UserError: The model's config.json can't be found, or sizes don't divide.
        """
        config = self.config_init
        trainer = self.config.trainer
        processes = device_count(trainer.devices) * int(trainer.num_nodes)
        return read_settings(
            self.model,
            config.rollout.collector,
            precision=precision_name(trainer.precision),
            prompt_tokens=self.datamodule.max_prompt_tokens,
            devices=processes,
            shards=shard_count(trainer.strategy, processes, int(trainer.num_nodes)),
            steps=int(trainer.max_steps) if int(trainer.max_steps) > 0 else None,
        )


def device_count(devices: Any) -> int:
    """Processes on a machine; ``auto`` and -1 are counted as one, since a plan is for no machine.

    Raises:
        UserError: No number can be read out of it.
    """
    if isinstance(devices, list):
        return len(devices)
    if devices in ("auto", -1, "-1"):
        return 1
    text = str(devices).strip("[] ,")
    if "," in text:
        return len([d for d in text.split(",") if d.strip()])
    if not text.isdigit() or int(text) < 1:
        raise UserError("trainer.devices is no number", got=devices, do="set --trainer.devices 1")
    return int(text)


def shard_count(strategy: Any, processes: int, nodes: int) -> int:
    """Processes that share weights: those of a ModelParallelStrategy, both of its sizes together."""
    path = str(getattr(strategy, "class_path", strategy))
    if "fsdp2" in path.lower():
        return processes
    if "ModelParallel" not in path:
        return 1
    init = getattr(strategy, "init_args", None) or {}
    data, tensor = init.get("data_parallel_size", "auto"), init.get("tensor_parallel_size", "auto")
    data = nodes if data == "auto" else int(data)
    tensor = processes // nodes if tensor == "auto" else int(tensor)
    return data * tensor
