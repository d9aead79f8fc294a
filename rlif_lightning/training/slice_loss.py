"""The forward of one slice of an update, and its loss."""

from typing import Any

from torch import Tensor, nn

from rlif_lightning.functional.fused_loss import fused_policy_loss
from rlif_lightning.functional.losses import Loss, PolicyLoss, is_separable, policy_loss
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
    *,
    loss: Loss,
    with_entropy: bool,
    entropy_coefficient: float,
    plain: bool = False,
    **settings: Any,
) -> PolicyLoss:
    """The loss of a slice with gradient in the policy's trainable weights.

    Loss and gradient of the logits are taken in one pass where each token's part depends on its own
    log-probability alone and the head is a weight and nothing else; otherwise the logits are computed twice.

    Args:
        policy: In training mode.
        rollout: The slice, with advantages and masks.
        denominator: D of the window.
        old_logprob: [N, T] of the policy that sampled; None: on policy.
        loss: Surrogate and weights of the tokens.
        with_entropy: Whether the entropy of the update's distributions is needed.
        entropy_coefficient: Of the entropy bonus at this step.
        plain: Hugging Face's own forward with all logits at once, and autograd.
        settings: The rest of :func:`~rlif_lightning.functional.losses.policy_loss`.
    """
    samples = rollout.samples
    assert rollout.advantages is not None and rollout.loss_mask is not None
    settings |= {
        "loss": loss,
        "old_logprob": old_logprob,
        "reference_logprob": rollout.kl_logprob,
        "surrogate_mask": rollout.surrogate_mask,
        "importance": rollout.importance,
    }
    if takes_fused_loss(policy, loss, with_entropy, plain):
        _, head = body_and_head(policy)
        assert head.weight is not None
        return fused_policy_loss(
            completion_hidden(policy, samples),
            head.weight,
            samples.completion_ids,
            samples.completion_mask,
            rollout.advantages,
            rollout.loss_mask,
            denominator,
            temperature=rollout.temperature,
            scale=head.scale,
            **settings,
        )
    scored, entropy = CompletionScores(policy, samples, plain), None
    if with_entropy:
        logprob, entropy = scored.logprobs_and_entropy(rollout.temperature)
    else:
        logprob = scored.logprobs(rollout.temperature)
    return policy_loss(
        logprob,
        rollout.advantages,
        rollout.loss_mask,
        denominator,
        entropy=entropy,
        entropy_coefficient=entropy_coefficient,
        **settings,
    )


def takes_fused_loss(policy: nn.Module, loss: Loss, with_entropy: bool, plain: bool) -> bool:
    """Whether :func:`slice_loss` takes loss and gradient of the logits together."""
    _, head = body_and_head(policy)
    return head.weight is not None and is_separable(loss) and not with_entropy and not plain
