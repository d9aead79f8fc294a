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

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rlif_lightning.version import __version__

if TYPE_CHECKING:
    from rlif_lightning.data.module import PromptDataModule
    from rlif_lightning.data.problems import Source
    from rlif_lightning.grading import AnswerFormat
    from rlif_lightning.integrations.scores import score
    from rlif_lightning.training.module import RLIFModule

__all__ = ["AnswerFormat", "PromptDataModule", "RLIFModule", "Source", "__version__", "score"]

_HOMES = {
    "AnswerFormat": "rlif_lightning.grading",
    "PromptDataModule": "rlif_lightning.data.module",
    "RLIFModule": "rlif_lightning.training.module",
    "Source": "rlif_lightning.data.problems",
    "score": "rlif_lightning.integrations.scores",
}


def __getattr__(name: str) -> Any:
    """Import on first use: the grading worker and ``rlif report`` start without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
