"""The command line: ``rlif fit | validate | test | predict`` and the commands that need no Trainer."""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rlif_lightning.errors import UserError

RUN_FOLDER = "RLIF_RUN_FOLDER"  # tells the processes that Lightning starts which folder their run has


def commands() -> dict[str, Callable[[list[str]], None]]:
    """The commands that need no Trainer."""
    from rlif_lightning.commands import report

    return {"report": report.main}


def main(args: Sequence[str] | None = None) -> None:
    """Run a command; a user's mistake prints its message and exits with 2."""
    arguments = list(sys.argv[1:] if args is None else args)
    try:
        own = commands().get(arguments[0]) if arguments else None
        if own is not None:
            own(arguments[1:])
        else:
            run_trainer(arguments)
    except BrokenPipeError:
        # The reader went away (rlif ... | head): end quietly, as other tools do.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None
    except Exception as error:
        mistake = users_mistake(error)
        if mistake is None:
            raise
        print(f"error: {mistake}", file=sys.stderr)
        raise SystemExit(2) from None


def users_mistake(error: BaseException | None) -> UserError | None:
    """The user's mistake behind an exception: libraries between us and the command line wrap it."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def run_trainer(arguments: list[str]) -> None:
    """Parse and run a command of the Trainer's."""
    quiet()
    from rlif_lightning.trainer_cli import RLIFCLI

    RLIFCLI.run(arguments)


def quiet() -> None:
    """Silence what users of this package can do nothing about."""
    import logging
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*eval mode at the start of training.*")
    warnings.filterwarnings("ignore", message=".*in `eval` mode.*")
    warnings.filterwarnings("ignore", message=".*Total length of `list` across ranks is zero.*")
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")  # Lightning against torch's newer name
    # bitsandbytes, which peft imports, looks for a faster 4-bit kernel; 4-bit works without it.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "litlogger" not in record.getMessage() and "Tip:" not in record.getMessage()
    )


def run_root(path: str) -> Path:
    """The folder that holds all runs.

    Raises:
        UserError: It can't be written to.
    """
    root = Path(path).expanduser()
    existing = next(p for p in (root, *root.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError("The output folder can't be written to", got=root, do="give another one with --runs")
    return root
