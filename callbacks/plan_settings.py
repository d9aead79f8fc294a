"""A plan's settings from a recipe's objects."""

from dataclasses import replace

from rlif_lightning.models.lora import find_adapter, off_is_the_start
from rlif_lightning.planning.configs import model_config
from rlif_lightning.planning.settings import Settings
from rlif_lightning.planning.weights import optimizer_memory
from rlif_lightning.sampling import NativeSampler
from rlif_lightning.training.collector import Collector
from rlif_lightning.training.module import RLIFModule


def plan_settings(
    module: RLIFModule, collector: Collector, precision: str, prompt_tokens: int, processes: int = 1, shards: int = 1
) -> Settings:
    """What decides about a recipe's memory, the longest prompt's tokens among it; no weights are loaded."""
    policy = module.policy_settings
    state_bytes, steps_at_once = optimizer_memory(module.make_optimizer)
    return Settings(
        model=policy.name,
        config=model_config(policy.name, **policy.source),
        precision=precision,
        batch=replace(collector.plan, world_size=processes),
        max_new_tokens=collector.sampling.max_new_tokens,
        prompt_tokens=prompt_tokens,
        state_bytes=state_bytes,
        steps_at_once=steps_at_once,
        lora=policy.lora if policy.adapter is None else find_adapter(policy.adapter, weights=False).lora,
        from_adapter=not off_is_the_start(policy.lora, policy.adapter),
        quantization=policy.quantization,
        gradient_checkpointing=policy.gradient_checkpointing,
        trust_remote_code=policy.trust_remote_code,
        fused_loss=module.loss.is_separable,
        references=frozenset({*module.needs, *collector.annotators}),
        statistics=3 + len(collector.sampling.statistics),
        votes=collector.votes or 0,
        rows=getattr(collector.sampler, "rows", None),
        native=isinstance(collector.sampler, NativeSampler),
        shards=shards,
    )
