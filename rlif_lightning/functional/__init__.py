"""The mathematics of RLIF as plain functions of tensors.

This room imports torch and the standard library only, so that every formula can be read, tested and reused
without a trainer, a model library or a configuration. In the order of a training step:

- :mod:`token_stats`: logits to log-probability, entropy and self-certainty of each token,
- :mod:`aggregation`: per-token statistics to one internal reward per completion,
- :mod:`advantages`: rewards to advantages within the group,
- :mod:`surrogates`: advantages and log-probabilities to the surrogate of each token,
- :mod:`entropy`: which tokens learn, and the coefficient of an entropy bonus,
- :mod:`losses`: advantages and log-probabilities to the loss of one slice,
- :mod:`chunked`: the statistics from hidden states, a few tokens at a time,
- :mod:`fused_loss`: the loss from hidden states, with its gradients in the same pass.

Reductions run in fp32 at least; float64 stays float64. Letters in shapes are those of :mod:`rlif_lightning`.
"""

from rlif_lightning.functional import (
    advantages,
    aggregation,
    chunked,
    entropy,
    fused_loss,
    losses,
    surrogates,
    token_stats,
)

__all__ = ["advantages", "aggregation", "chunked", "entropy", "fused_loss", "losses", "surrogates", "token_stats"]
