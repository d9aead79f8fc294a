"""RL from internal feedback (RLIF) on PyTorch Lightning.

One shape legend serves the whole code:

====  ==========================================================
P     prompts of one rollout on one rank
G     completions per prompt (the group)
N     completions, N = P * G, the rows of a group next to each other
L     prompt tokens, padded on the left
T     completion tokens, padded on the right
V     vocabulary
H     hidden width
M     slices (micro-batches) of one optimiser step
====  ==========================================================

Logarithms are natural: log-probabilities, entropies and divergences are in nats.
"""

from rlif_lightning.version import __version__

__all__ = ["__version__"]
