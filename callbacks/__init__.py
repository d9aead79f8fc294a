"""Lightning callbacks: rollouts, guard, evaluation, samples, checkpoints, progress, report."""

from rlif_lightning.callbacks.checkpoint import RolloutCheckpoint
from rlif_lightning.callbacks.completions import Completions
from rlif_lightning.callbacks.evaluation import Evaluation
from rlif_lightning.callbacks.guard import CollapseGuard
from rlif_lightning.callbacks.memory_check import MemoryCheck
from rlif_lightning.callbacks.progress import StepProgressBar
from rlif_lightning.callbacks.report import Report
from rlif_lightning.callbacks.rollout import RolloutCallback

__all__ = [
    "CollapseGuard", "Completions", "Evaluation", "MemoryCheck", "Report", "RolloutCallback", "RolloutCheckpoint",
    "StepProgressBar",
]  # fmt: skip
