"""Reading answers out of texts and comparing them: hostile input is expected, and costs little."""

from rlif_lightning.grading.answers import AnswerFormat, Gold, check_gold, gold_text, read_gold, read_tolerance
from rlif_lightning.grading.extraction import Found, check_where, extract, locate
from rlif_lightning.grading.grader import Grader
from rlif_lightning.grading.metrics import agreement, bootstrap_interval, maj_at_k, pass_at_k
from rlif_lightning.grading.normalise import normalise

__all__ = [
    "AnswerFormat",
    "Found",
    "Gold",
    "Grader",
    "agreement",
    "bootstrap_interval",
    "check_gold",
    "check_where",
    "extract",
    "gold_text",
    "locate",
    "maj_at_k",
    "normalise",
    "pass_at_k",
    "read_gold",
    "read_tolerance",
]
