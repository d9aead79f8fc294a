"""The embedded default: a tiny base model and its arithmetic problems, so that everything runs without a hub.

Built on first use as an ordinary Hugging Face folder in the user's cache; docs/toy.md says what it is and proves.
"""

from rlif_lightning.toy.cache import parse_toy_name, refuse_almost_toy, toy_model
from rlif_lightning.toy.problems import toy_problems

__all__ = ["parse_toy_name", "refuse_almost_toy", "toy_model", "toy_problems"]
