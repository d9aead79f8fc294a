"""The one state in which the policy is sampled."""

from collections.abc import Sequence

import torch
from lightning.pytorch import Trainer

from rlif_lightning.data.prompts import Prompt
from rlif_lightning.errors import UserError
from rlif_lightning.models.strategies import shares_out
from rlif_lightning.sampling import Sampler, Sampling, VLLMSampler


def check_sampler(sampler: Sampler, trainer: Trainer, sampling: Sampling, prompts: Sequence[Prompt]) -> None:
    """As :func:`check_engine`, for the processes of a Trainer.

    Raises:
        UserError: As there, or vLLM is beside a strategy that cuts the policy into shards.
    """
    device = None if shares_out(trainer.strategy) else trainer.strategy.root_device
    check_engine(sampler, sampling, prompts, device, trainer.world_size)
    if device is None and isinstance(sampler, VLLMSampler):
        raise UserError(
            "VLLMSampler needs the whole policy in each process, and this strategy cuts it into shards",
            got=type(trainer.strategy).__name__,
            do="use --trainer.strategy ddp, or leave rollout.sampler out",
        )


def check_engine(
    sampler: Sampler, sampling: Sampling, prompts: Sequence[Prompt], device: torch.device | None, processes: int = 1
) -> None:
    """Refuse, before the weights are loaded, an engine that could not start, could not get them, or could not sample.

    Args:
        sampler: The engine.
        sampling: The law that it will draw from.
        prompts: That it will complete.
        device: Of the policy.
        processes: That sample.

    Raises:
        UserError: vLLM is not installed, can't sample so, or would take another GPU.
    """
    if not isinstance(sampler, VLLMSampler):
        return
    sampler.check(max((len(p.ids) for p in prompts), default=0), sampling)
    if processes == 1 and device is not None and device.type == "cuda" and device.index:
        raise UserError(
            "vLLM takes the first GPU that it sees where there is one process, and training would take another",
            got=f"trainer.devices [{device.index}]",
            do=f"set CUDA_VISIBLE_DEVICES={device.index} and --trainer.devices 1, or leave rollout.sampler out",
        )
