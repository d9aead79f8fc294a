"""What the first rollout shows can't work, before the first update."""

from collections.abc import Mapping

from rlif_lightning.errors import UserError
from rlif_lightning.training.collector import READING, Collector

ENGINE_KL = 0.1
"""Nats per token between engine and policy from which on the engine computes something else than the policy."""


def check_first_rollout(metrics: Mapping[str, float], collector: Collector) -> None:
    """Refuse an engine or rewards that can't work on this model and data.

    Args:
        metrics: Of the first rollout, over all processes.
        collector: Who collected it.

    Raises:
        UserError: The engine is not the policy; answers are needed and no completion has one; or the rewards cancel.
    """
    names = [r.name for r in collector.rewards if r.requires & READING] or ["agreement_band"]
    if metrics.get("rollout/engine_kl", 0.0) > ENGINE_KL:
        raise UserError(
            "The engine of rollout.sampler computes something else than the policy",
            got=f"{metrics['rollout/engine_kl']:.3g} nats per token between them",
            expected=f"at most {ENGINE_KL}; below 0.01 in bfloat16, near 0 in float32",
            do="leave rollout.sampler out",
        )
    if collector.needs_answers and not metrics.get("rollout/answered_fraction"):
        raise UserError(
            f"{', '.join(names)} compares answers, and none of the first completions has one",
            do="say in --data.answers.completion where answers stand, or choose another reward",
        )
    if metrics["rollout/advantage_size"] < 1e-6 and metrics["rollout/gated_fraction"] < 1:
        raise UserError(
            "The rewards cancel: their weighted advantages sum to 0 for every completion",
            got=", ".join(r.name for r in collector.rewards),
            do="change --rollout.rewards or their weights",
        )
