"""The embedded default: a tiny base model and its arithmetic problems, so that everything runs without a hub.

It is built on first use, in tens of seconds on one CPU core, as an ordinary Hugging Face folder in the user's cache.
It exists for any seed (``toy:3``) and in two variants: ``toy``, a base model (several solution styles, slips, about
0.3 sampled accuracy), and ``toy-tuned``, the same after some training on clean step-by-step solutions. The recipe was
searched until internal rewards made accuracy rise and then fall, and proves nothing about language models.
"""

from rlif_lightning.toy.cache import parse_toy_name, refuse_almost_toy, toy_model
from rlif_lightning.toy.problems import toy_problems

__all__ = ["parse_toy_name", "refuse_almost_toy", "toy_model", "toy_problems"]
