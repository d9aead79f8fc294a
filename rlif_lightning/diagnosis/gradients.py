"""The policy gradients that several rewards give on the same completions, and the angles between them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from rlif_lightning.functional.loss_records import LossInputs, LossSettings
from rlif_lightning.functional.losses import loss_denominator, policy_loss
from rlif_lightning.models.scoring import CompletionScores
from rlif_lightning.rollout import Rollout


def gradient_bytes(policy: nn.Module, rewards: int) -> int:
    """Memory that :func:`policy_gradients` keeps, besides the model's own."""
    return 2 * rewards * 4 * sum(p.numel() for p in policy.parameters() if p.requires_grad)


def policy_gradients(
    policy: nn.Module,
    rollouts: Sequence[Rollout],
    advantages: Sequence[Mapping[str, Tensor]],
    loss: LossSettings,
    max_tokens: int,
    micro_batch_size: int | None = None,
) -> Tensor:
    """Ascent directions of the first update, on policy: float32 [2, K, weights] on the CPU, for each half and reward.

    The halves are prompts of even and of odd place, and their sum is the gradient of all. Rollouts have loss masks
    [N, T], and each has a reward's name to its advantages [N]. Only the loss's weights of the tokens count: KL and
    bonus are left out, and on policy all surrogates have one gradient.
    """
    weights = [p for p in policy.parameters() if p.requires_grad]
    names = list(advantages[0])
    out = torch.zeros(2, len(names), sum(p.numel() for p in weights))
    settings = LossSettings(loss.name)
    masks = [r.loss_mask for r in rollouts if r.loss_mask is not None]
    denominator = sum(float(loss_denominator(mask, settings, max_tokens)) for mask in masks)
    for rollout, parts in zip(rollouts, advantages, strict=True):
        for half, rows in _slices(rollout, micro_batch_size):
            part = rollout.slice(rows)
            assert part.loss_mask is not None
            logprob = CompletionScores(policy, part.samples).logprobs(rollout.temperature)
            for k, name in enumerate(names):
                inputs = LossInputs(parts[name][rows.to(parts[name].device)], part.loss_mask)
                ascent = -policy_loss(logprob, inputs, denominator, settings).loss
                grads = torch.autograd.grad(ascent, weights, retain_graph=k + 1 < len(names), allow_unused=True)
                flat = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, grads, strict=True)]
                out[half, k] += torch.cat([g.detach().flatten().float().cpu() for g in flat])
    return out


def cosines(vectors: Tensor, others: Tensor) -> Tensor:
    """Cosines [K, J] between rows of [K, D] and of [J, D]; nan where a row is 0."""
    norms = vectors.norm(dim=1)[:, None] * others.norm(dim=1)[None, :]
    return (vectors @ others.T / norms).masked_fill(norms == 0, torch.nan)


def _slices(rollout: Rollout, size: int | None) -> list[tuple[int, Tensor]]:
    """(half, rows) of each micro-batch, rows ordered by length so that little is padded."""
    lengths = rollout.samples.lengths.cpu()
    place = torch.arange(len(lengths)) // rollout.group_size
    slices = []
    for half in (0, 1):
        rows = (place % 2 == half).nonzero().squeeze(1)
        rows = rows[lengths[rows].argsort(stable=True)]
        slices += [(half, part) for part in rows.split(size or max(len(rows), 1)) if len(part)]
    return slices
