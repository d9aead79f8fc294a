"""The one state in which the policy is sampled."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from lightning.pytorch import Trainer
from torch import nn

from rlif_lightning.data.prompts import Prompt
from rlif_lightning.errors import UserError
from rlif_lightning.models.fsdp2 import shares_out
from rlif_lightning.models.policy import set_training_mode
from rlif_lightning.sampling import Sampler, Sampling, VLLMSampler
from rlif_lightning.training.module import RLIFModule


def check_sampler(sampler: Sampler, trainer: Trainer, sampling: Sampling, prompts: Sequence[Prompt]) -> None:
    """Refuse, before the weights are loaded, an engine that could not start, could not get them, or could not sample.

    Args:
        sampler: The engine.
        trainer: Of the run.
        sampling: The law that it will draw from.
        prompts: That it will complete.

    Raises:
        UserError: vLLM is not installed, can't sample so, would take another GPU, or is beside a strategy that
            cuts the policy into shards.
    """
    if not isinstance(sampler, VLLMSampler):
        return
    sampler.check(max((len(p.ids) for p in prompts), default=0), sampling)
    if shares_out(trainer.strategy):
        raise UserError(
            "VLLMSampler needs the whole policy in each process, and this strategy cuts it into shards",
            got=type(trainer.strategy).__name__,
            do="use --trainer.strategy ddp, or leave rollout.sampler out",
        )
    device = trainer.strategy.root_device
    if trainer.world_size == 1 and device.type == "cuda" and device.index:
        raise UserError(
            "vLLM takes the first GPU that it sees where there is one process, and training would take another",
            got=f"trainer.devices [{device.index}]",
            do=f"set CUDA_VISIBLE_DEVICES={device.index} and --trainer.devices 1, or leave rollout.sampler out",
        )


@contextmanager
def inference(trainer: Trainer, module: RLIFModule) -> Iterator[nn.Module]:
    """Dropout and gradients off, the Trainer's precision on; yields the whole policy. On all processes as often.

    Lightning enters its precision context around its own steps only, not around callbacks.
    """
    assert module.policy is not None
    for optimizer in trainer.optimizers:
        optimizer.zero_grad(set_to_none=True)  # their memory is worth more to the sampler
    set_training_mode(module.policy, training=False)
    with torch.no_grad(), trainer.precision_plugin.forward_context(), module.whole_policy() as policy:
        yield policy


@contextmanager
def ready(sampler: Sampler, trainer: Trainer, module: RLIFModule) -> Iterator[nn.Module]:
    """The sampler up to date with the policy, which is yielded as :func:`inference` does."""
    with inference(trainer, module) as policy:
        sampler.update(policy, module.end_ids, module.tokenizer.pad_token_id)
        try:
            yield policy
        finally:
            sampler.release()
