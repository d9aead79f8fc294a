"""The forward of one slice of an update, and its loss."""

from torch import Tensor, nn

from rlif_lightning.functional.fused_loss import fused_policy_loss
from rlif_lightning.functional.loss_records import LossInputs, LossSettings, PolicyLoss
from rlif_lightning.functional.losses import policy_loss
from rlif_lightning.models.fsdp2 import runs_inside
from rlif_lightning.models.lm_head import body_and_head
from rlif_lightning.models.scoring import CompletionScores, completion_hidden
from rlif_lightning.rollout import Rollout


@runs_inside
def slice_loss(
    policy: nn.Module,
    rollout: Rollout,
    denominator: Tensor | float,
    old_logprob: Tensor | None,
    settings: LossSettings,
) -> PolicyLoss:
    """The loss of a slice, with advantages and masks, and its gradient in a policy in training mode.

    Loss and gradient of the logits are taken together where each token's part depends on its own log-probability
    alone and the head is a weight and nothing else; otherwise the logits are computed twice. ``denominator`` is D of
    the window, ``old_logprob`` [N, T] that of the policy that sampled, None on policy. The entropy is taken where its
    coefficient is not None.
    """
    samples, temperature = rollout.samples, rollout.temperature
    assert rollout.advantages is not None and rollout.loss_mask is not None
    inputs = LossInputs(
        rollout.advantages,
        rollout.loss_mask,
        old_logprob=old_logprob,
        reference_logprob=rollout.kl_logprob,
        surrogate_mask=rollout.surrogate_mask,
        importance=rollout.importance,
    )
    if takes_fused_loss(policy, settings):
        _, head = body_and_head(policy)
        assert head.weight is not None
        return fused_policy_loss(
            completion_hidden(policy, samples),
            head.weight,
            samples.completion_ids,
            samples.completion_mask,
            inputs,
            denominator,
            settings,
            temperature=temperature,
            scale=head.scale,
        )
    scores = CompletionScores(policy, samples)
    if settings.entropy_coefficient is None:
        return policy_loss(scores.logprobs(temperature), inputs, denominator, settings)
    stats = scores.stats(temperature)
    return policy_loss(stats.logprob, inputs, denominator, settings, stats.entropy)


def takes_fused_loss(policy: nn.Module, settings: LossSettings) -> bool:
    """Whether :func:`slice_loss` takes loss and gradient of the logits together."""
    _, head = body_and_head(policy)
    return head.weight is not None and settings.is_separable
