"""Warnings as users should see them."""

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

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


def short_warnings() -> None:
    """On the command line a warning of this package is its text; others keep their place in the code."""
    usual = warnings.formatwarning
    if usual.__module__ == __name__:
        return
    specs = [find_spec(name) for name in ("rlif_lightning", "rlif_lightning.callbacks")]
    homes = [Path(spec.origin).parent for spec in specs if spec and spec.origin]

    def format_warning(message: Any, category: Any, filename: str, lineno: int, line: str | None = None) -> str:
        if any(home in Path(filename).parents for home in homes):
            return f"warning: {message}\n"
        return usual(message, category, filename, lineno, line)

    warnings.formatwarning = format_warning
