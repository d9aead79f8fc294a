"""Warnings as users should see them."""

import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn

__all__ = ["no_bar", "no_load_report", "quiet_lightning", "rank_zero_info", "rank_zero_warn"]

RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
# As Lightning does when it is imported, which may be later or never.
vars(rank_zero_only).setdefault("rank", next((int(os.environ[name]) for name in RANKS if name in os.environ), 0))

MEANT = (
    ".*does not have many workers.*",  # prompts are lists
    ".*eval mode at the start of training.*",  # dropout is off: see policy.set_training_mode
    ".*in `eval` mode.*",
    ".*Total length of `list` across ranks is zero.*",  # the Evaluation callback takes the validation problems
    ".*predict returned None.*",  # and those of rlif predict
    ".*treespec, LeafSpec.*",  # Lightning against torch's newer name
)


def quiet_lightning() -> None:
    """Leave out the warnings about what is meant to be so."""
    for message in MEANT:
        warnings.filterwarnings("ignore", message=message)


@contextmanager
def no_bar() -> Iterator[None]:
    """Keep transformers from showing a bar, as it does even for a single file."""
    from transformers.utils import logging as transformers_logging

    shows_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shows_bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def no_load_report() -> Iterator[None]:
    """Keep transformers from printing its table of weights that do not fit: messages of this package say it."""

    def is_other(record: logging.LogRecord) -> bool:
        return not re.search("LOAD REPORT|checkpoint seem corrupted", str(record.msg))

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)
