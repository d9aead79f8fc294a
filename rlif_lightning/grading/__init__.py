"""Reading answers out of texts and comparing them: hostile input is expected, and costs little."""

from rlif_lightning.grading.answers import AnswerFormat, Gold, SourceAnswers, check_gold, read_gold
from rlif_lightning.grading.extraction import check_where
from rlif_lightning.grading.grader import ROLLOUT_SECONDS, Grader
from rlif_lightning.grading.metrics import agreement, maj_at_k, mean_interval, pass_at_k

__all__ = [
    "ROLLOUT_SECONDS", "AnswerFormat", "Gold", "Grader", "SourceAnswers", "agreement", "check_gold",
    "check_where", "maj_at_k", "mean_interval", "pass_at_k", "read_gold",
]  # fmt: skip
