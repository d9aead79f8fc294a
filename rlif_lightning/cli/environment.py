"""What the process needs before recipes are read: the user's own modules, and libraries that keep quiet."""

import logging
import os
import sys
import threading

from rlif_lightning.errors import disk_failure

SAID_BY_LIGHTNING = ("litlogger", "Tip:", "TPU available", "💡", "`Trainer.fit` stopped")


def prepare() -> None:
    """Make the modules in the current folder importable, and silence what users can do nothing about."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # class paths in recipes may name the user's own files
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "10")  # a log file needs few pictures of a bar
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # about calls that Lightning makes
    # bitsandbytes, which peft imports, looks for a faster 4-bit kernel; 4-bit works without it.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    lightning = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    lightning.addFilter(lambda record: not any(words in record.getMessage() for words in SAID_BY_LIGHTNING))
    _quiet_threads()


def _quiet_threads() -> None:
    """No traceback of TensorBoard's writing thread on a full disk: the run meets the error itself."""
    usual = threading.excepthook
    if usual.__module__ == __name__:
        return

    def ended(args: threading.ExceptHookArgs) -> None:
        if disk_failure(args.exc_value) is None:
            usual(args)

    threading.excepthook = ended
