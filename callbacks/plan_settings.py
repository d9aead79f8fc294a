"""A plan's settings from a recipe's objects."""

from dataclasses import replace

from rlif_lightning.callbacks.rollout import ANNOTATORS, RolloutCallback
from rlif_lightning.functional.losses import is_separable
from rlif_lightning.models.lora import adapter_settings, off_is_the_start
from rlif_lightning.planning.configs import model_config
from rlif_lightning.planning.settings import Settings
from rlif_lightning.planning.weights import optimizer_memory
from rlif_lightning.sampling import NativeSampler
from rlif_lightning.training.module import RLIFModule


def plan_settings(
    module: RLIFModule,
    rollout: RolloutCallback,
    *,
    precision: str,
    prompt_tokens: int,
    processes: int = 1,
    shards: int = 1,
) -> Settings:
    """What decides about a recipe's memory; no weights are loaded.

    Args:
        module: Its settings and the name of its model.
        rollout: Sizes, sampler and rewards.
        precision: Of the Trainer.
        prompt_tokens: Of the longest prompt.
        processes: Over all nodes.
        shards: Processes that share weights, gradients and optimiser states.

    Raises:
        UserError: The model's or the adapter's configuration can't be found, or the sizes do not divide.
    """
    needs = frozenset().union(*(r.requires for r in rollout.rewards)) & ANNOTATORS.keys()
    state_bytes, steps_at_once = optimizer_memory(module.make_optimizer)
    return Settings(
        model=module.name,
        config=model_config(module.name, revision=module.revision, trust_remote_code=module.trust_remote_code),
        precision=precision,
        batch=replace(rollout.plan, world_size=processes),
        max_new_tokens=rollout.sampling.max_new_tokens,
        prompt_tokens=prompt_tokens,
        state_bytes=state_bytes,
        steps_at_once=steps_at_once,
        lora=module.lora if module.adapter is None else adapter_settings(module.adapter),
        from_adapter=not off_is_the_start(module.lora, module.adapter),
        quantization=module.quantization,
        gradient_checkpointing=module.gradient_checkpointing,
        attn_implementation=module.attn_implementation,
        trust_remote_code=module.trust_remote_code,
        fused_loss=is_separable(module.loss) and not module.entropy_bonus.measured,
        versions=frozenset({*module.needs, *(ANNOTATORS[a] for a in needs)}),
        statistics=3 + len(rollout.sampling.statistics),
        votes=rollout.votes or 0,
        rows=getattr(rollout.sampler, "rows", None),
        native=isinstance(rollout.sampler, NativeSampler),
        shards=shards,
    )
