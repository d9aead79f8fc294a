"""What is logged of a rollout."""

from collections.abc import Sequence

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from rlif_lightning.callbacks.logs import Means
from rlif_lightning.functional.losses import k3_divergence
from rlif_lightning.grading import agreement
from rlif_lightning.rewards import Reward
from rlif_lightning.rollout import Rollout


def rollout_metrics(
    trainer: Trainer, rollout: Rollout, gated: Tensor, rewards: Sequence[Reward], seconds: float
) -> dict[str, float]:
    """Means of a rollout over all processes, reduced once.

    Args:
        trainer: Reduces over processes.
        rollout: With rewards.
        gated: [P] groups that teach nothing.
        rewards: Whose weighted sum is ``rollout/reward``; several are logged one by one as well.
        seconds: That sampling took.

    Returns:
        ``rollout/*``: per-token statistics as means over tokens (nats), the others over completions or groups.
    """
    samples, g = rollout.samples, rollout.group_size
    mask = samples.completion_mask
    tokens = mask.sum()
    means = Means()
    total = torch.stack([r.weight * rollout.rewards[r.name] for r in rewards]).sum(0)  # [N]
    means.rows("rollout/reward", total)
    means.rows("rollout/reward_std", total.view(-1, g).std(1))
    if len(rewards) > 1:
        for name, values in rollout.rewards.items():
            means.rows(f"rollout/reward/{name}", values)
    assert samples.stats is not None and samples.logprob is not None
    for name, values in (
        ("self_certainty", samples.stats.self_certainty),
        ("entropy", samples.stats.entropy),
        ("logprob", samples.logprob),
    ):
        means.add(f"rollout/{name}", values[mask].sum(), tokens)
    if rollout.reference_logprob is not None:
        reference = rollout.reference_logprob[mask]
        means.add("rollout/reference_logprob", reference.sum(), tokens)
        means.add("rollout/kl", k3_divergence(samples.logprob[mask], reference).sum(), tokens)
    means.rows("rollout/completion_tokens", samples.lengths.float())
    means.rows("rollout/truncated_fraction", (~samples.ended).float())
    means.rows("rollout/gated_fraction", gated.float())
    if samples.kept_mass is not None:
        means.add("rollout/kept_mass", samples.kept_mass[mask].sum(), tokens)
    groups = [rollout.answers[i : i + g] for i in range(0, len(rollout.answers), g)]
    means.rows("rollout/agreement", torch.tensor([agreement(x) for x in groups]))
    if rollout.correct is not None:
        means.rows("rollout/accuracy", rollout.correct)
    means.add("rollout/tokens_per_second", tokens * trainer.world_size, seconds)
    metrics = means.reduce(trainer)
    if rollout.correct is None and not metrics["rollout/agreement"]:
        del metrics["rollout/agreement"]  # open-ended texts: no answer to agree on, on any process
    return metrics
