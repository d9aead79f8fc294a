"""The mathematics of RLIF as plain functions of tensors.

This room imports torch and the standard library only, so that every formula can be read, tested and reused
without a trainer, a model library or a configuration. In the order of a training step:

- :mod:`seeds`: a completion's place in the run to its seed,
- :mod:`token_stats`: logits to log-probability, entropy and self-certainty of each token,
- :mod:`chunked`: the statistics from hidden states, a few tokens at a time,
- :mod:`aggregation`: per-token statistics to one internal reward per completion,
- :mod:`advantages`: rewards to advantages within the group,
- :mod:`similarity`: how alike the completions of a group are,
- :mod:`entropy`: which tokens learn, and the coefficient of an entropy bonus,
- :mod:`surrogates`: advantages and log-probabilities to the surrogate of each token,
- :mod:`loss_records`: settings, inputs and answers of the loss,
- :mod:`losses`: advantages and log-probabilities to the loss of one slice,
- :mod:`fused_loss`: the loss from hidden states, with its gradients in the same pass,
- :mod:`cast_linear`: linear layers that keep no rounded copy of their weight for the backward pass.

Reductions run in fp32 at least; float64 stays float64. Letters in shapes are those of :mod:`rlif_lightning`.
"""
