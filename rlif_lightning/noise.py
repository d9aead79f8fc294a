"""Warnings of Lightning's that are meant here, and that users can do nothing about."""

import warnings

MEANT = (
    ".*does not have many workers.*",  # prompts are lists
    ".*eval mode at the start of training.*",  # dropout is off: see policy.set_training_mode
    ".*in `eval` mode.*",
    ".*Total length of `list` across ranks is zero.*",  # the Evaluation callback takes the validation problems
    ".*predict returned None.*",  # and those of rlif predict
    ".*treespec, LeafSpec.*",  # Lightning against torch's newer name
)


def quiet_lightning() -> None:
    """Leave these warnings out."""
    for message in MEANT:
        warnings.filterwarnings("ignore", message=message)
