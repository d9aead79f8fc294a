"""What the process needs before recipes are read: the user's own modules, and libraries that keep quiet."""

import logging
import os
import sys
import threading
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rlif_lightning.errors import disk_failure, escaped

SAID_BY_LIGHTNING = (
    "litlogger", "Tip:", "GPU available: False", "TPU available", "💡", "`Trainer.fit` stopped", "Seed set to",
)  # fmt: skip


def prepare(own_modules: bool = True) -> None:
    """Make the modules in the current folder importable, or not, and silence what users can do nothing about."""
    here = os.getcwd()
    if not own_modules:
        sys.path[:] = [path for path in sys.path if path not in ("", here)]  # `python -m` puts it there
    elif here not in sys.path:
        sys.path.append(here)  # class paths in recipes may name the user's own files
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "10")  # a log file needs few pictures of a bar
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # about calls that Lightning makes
    # bitsandbytes, which peft imports, looks for a faster 4-bit kernel; 4-bit works without it.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    for speaker in ("pytorch.utilities.rank_zero", "fabric.utilities.seed"):
        logging.getLogger(f"lightning.{speaker}").addFilter(_not_said_by_lightning)
    _quiet_threads()


def _not_said_by_lightning(record: logging.LogRecord) -> bool:
    record.msg, record.args = escaped(record.getMessage()), ()
    return not any(words in record.msg for words in SAID_BY_LIGHTNING)


def _quiet_threads() -> None:
    """No traceback of TensorBoard's writing thread on a full disk: the run meets the error itself."""
    usual = threading.excepthook
    if usual.__module__ == __name__:
        return

    def ended(args: threading.ExceptHookArgs) -> None:
        if disk_failure(args.exc_value) is None:
            usual(args)

    threading.excepthook = ended


def short_warnings() -> None:
    """On the command line a warning of this package is its text; others keep their place in the code."""
    usual = warnings.formatwarning
    if usual.__module__ == __name__:
        return
    specs = [find_spec(name) for name in ("rlif_lightning", "rlif_lightning.callbacks")]
    homes = [Path(spec.origin).parent for spec in specs if spec and spec.origin]

    def format_warning(message: Any, category: Any, filename: str, lineno: int, line: str | None = None) -> str:
        if any(home in Path(filename).parents for home in homes):
            return f"warning: {escaped(str(message))}\n"
        return escaped(usual(message, category, filename, lineno, line))

    warnings.formatwarning = format_warning
