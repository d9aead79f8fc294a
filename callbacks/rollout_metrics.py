"""What is logged of a rollout."""

import torch
from lightning.pytorch import Trainer

from rlif_lightning.callbacks.logging import Means
from rlif_lightning.functional.losses import kl_estimate
from rlif_lightning.functional.similarity import group_similarity
from rlif_lightning.grading import agreement
from rlif_lightning.training.collector import Collected


def rollout_metrics(trainer: Trainer, collected: Collected) -> dict[str, float]:
    """Means of a rollout over all processes, reduced once.

    Args:
        trainer: Reduces over processes.
        collected: The rollout. The weighted sum of its rewards is ``rollout/reward``; several rewards are logged one
            by one as well.

    Returns:
        ``rollout/*``: per-token statistics as means over tokens (nats), the others over completions or groups.
    """
    rollout, weights = collected.rollout, collected.weights
    samples, g = rollout.samples, rollout.group_size
    mask = samples.completion_mask
    tokens = mask.sum()
    means = Means()
    total = torch.zeros(len(mask), device=mask.device)  # [N]; where a schedule has only zeros at this step, it stays
    for weight, values in zip(weights, rollout.rewards.values(), strict=True):
        if weight:
            total = total + weight * values
    means.rows("rollout/reward", total)
    means.rows("rollout/reward_std", total.view(-1, g).std(1))
    if len(weights) > 1:
        for name, values in rollout.rewards.items():
            means.rows(f"rollout/reward/{name}", values)
    assert samples.stats is not None and samples.logprob is not None
    for name, values in (
        ("self_certainty", samples.stats.self_certainty),
        ("entropy", samples.stats.entropy),
        ("logprob", samples.logprob),
    ):
        means.add(f"rollout/{name}", values[mask].sum(), tokens)
    if rollout.start_logprob is not None:
        means.add("rollout/start_logprob", rollout.start_logprob[mask].sum(), tokens)
    if rollout.kl_logprob is not None:
        divergence = kl_estimate(samples.logprob[mask], rollout.kl_logprob[mask])
        means.add("rollout/kl", divergence.sum(), tokens)
    if samples.engine_logprob is not None:
        engine = samples.engine_logprob[mask]
        means.add("rollout/engine_kl", kl_estimate(engine, samples.logprob[mask]).sum(), tokens)
        if rollout.importance is not None:
            cut = samples.logprob[mask] - engine > rollout.importance[mask].log() + 1e-6
            means.add("rollout/importance_capped", cut.sum(), tokens)
    means.rows("rollout/completion_tokens", samples.lengths.float())
    means.rows("rollout/truncated_fraction", (~samples.ended).float())
    means.rows("rollout/gated_fraction", collected.gated.float())
    if collected.filtered is not None:
        means.rows("rollout/filtered_fraction", collected.filtered.float())
    assert rollout.advantages is not None
    means.rows("rollout/advantage_size", rollout.advantages.abs())
    means.rows("rollout/answered_fraction", torch.tensor([float(a is not None) for a in rollout.answers]))
    if samples.kept_mass is not None:
        means.add("rollout/kept_mass", samples.kept_mass[mask].sum(), tokens)
    means.rows("rollout/similarity", group_similarity(samples.completion_ids, mask, g))
    means.rows("rollout/agreement", torch.tensor([agreement(x[:g]) for x in rollout.votes]))
    if rollout.correct is not None:
        means.rows("rollout/accuracy", rollout.correct)
    means.add("rollout/tokens_per_second", tokens * trainer.world_size, collected.sampling_seconds)
    metrics = means.reduce(trainer)
    if samples.engine_logprob is not None:
        largest = (samples.logprob - samples.engine_logprob)[mask].max().exp()
        metrics["rollout/engine_ratio_max"] = float(trainer.strategy.reduce(largest, reduce_op="max"))
    if rollout.correct is None and not metrics["rollout/answered_fraction"]:
        del metrics["rollout/agreement"]  # open-ended texts: no answer to agree on, on any process
    return metrics
