"""The command line: ``rlif fit | validate | test | predict`` and the commands that need no Trainer."""

import difflib
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rlif_lightning.errors import UserError
from rlif_lightning.version import __version__

RUN_FOLDER = "RLIF_RUN_FOLDER"  # tells the processes that Lightning starts which folder their run has


TRAINER_COMMANDS = {
    "fit": "train a model; a run folder holds checkpoints, curves and completions",
    "validate": "evaluate on the validation problems",
    "test": "evaluate on the test problems",
    "predict": "complete problems and write what the model says",
}


def commands() -> dict[str, Callable[[list[str]], None]]:
    """The commands that need no Trainer."""
    from rlif_lightning.commands import diagnose, export, mix, plan, report

    modules = {"plan": plan, "diagnose": diagnose, "mix": mix, "export": export, "report": report}
    return {name: module.main for name, module in modules.items()}


def main(args: Sequence[str] | None = None) -> None:
    """Run a command; a user's mistake prints its message and exits with 2."""
    arguments = list(sys.argv[1:] if args is None else args)
    try:
        dispatch(arguments)
    except BrokenPipeError:
        # The reader went away (rlif ... | head): end quietly, as other tools do.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None
    except KeyboardInterrupt:  # outside of training, which ends at a checkpoint and says so
        print("\nStopped.", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception as error:
        mistake, lost = users_mistake(error), lost_process(error)
        if mistake is None and lost is None:
            raise
        print(f"error: {mistake or lost}", file=sys.stderr, flush=True)
        raise SystemExit(2 if mistake else 1) from None


def dispatch(arguments: list[str]) -> None:
    """Run the command that the first word names.

    Raises:
        UserError: There is no such command.
    """
    first = arguments[0] if arguments else None
    if first in (None, "-h", "--help"):
        print(overview())
        if first is None:
            raise SystemExit(2)
    elif first == "--version":
        print(f"rlif-lightning {__version__}")
    elif first in TRAINER_COMMANDS:
        run_trainer(arguments)
    elif first in commands():
        commands()[str(first)](arguments[1:])
    else:
        raise _unknown_command(str(first))


def overview() -> str:
    """The commands, each in a line."""
    lines = ["RL from internal feedback: train a language model on its own confidence, without labels.", ""]
    lines += ["usage: rlif COMMAND [--config RECIPE ...] [--setting VALUE ...]", ""]
    own = {name: _first_line(sys.modules[run.__module__].__doc__) for name, run in commands().items()}
    everything = {**TRAINER_COMMANDS, **own}
    width = max(map(len, everything))
    lines += [f"  {name:<{width}}  {what}" for name, what in everything.items()]
    lines += ["", "Settings of a command: rlif COMMAND --help", "First try: rlif fit --config quickstart"]
    return "\n".join(lines)


def _first_line(doc: str | None) -> str:
    """What a command's module says of itself after its name."""
    return (doc or "").strip().splitlines()[0].partition(": ")[2].rstrip(".") if doc else ""


def _unknown_command(word: str) -> UserError:
    known = [*TRAINER_COMMANDS, *commands()]
    if word.startswith("-"):
        return UserError("The command comes first", got=word, do=f"rlif fit {word} ...; commands: {', '.join(known)}")
    near = difflib.get_close_matches(word, known, 1)
    if not near:
        from rlif_lightning.cli.recipes import shipped_recipes

        near = [f"fit --config {name}" for name in difflib.get_close_matches(word, shipped_recipes(), 1, 0.8)]
    return UserError(
        f"No command is called '{word}'",
        expected=f"one of {', '.join(known)}",
        do=f"did you mean rlif {near[0]}?" if near else None,
    )


def users_mistake(error: BaseException | None) -> UserError | None:
    """The user's mistake behind an exception: libraries between us and the command line wrap it."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out",
    "Socket Timeout",
    "communicator was aborted",
    "remote process exited",
)


def lost_process(error: BaseException | None) -> UserError | None:
    """What to say where another process of the run has gone: gloo and NCCL only tell of a connection."""
    while error is not None:
        said = str(error)
        distributed = "gloo" in said or type(error).__name__ in (
            "DistBackendError",
            "DistNetworkError",
            "DistStoreError",
        )
        if distributed and any(words in said for words in LOST):
            return UserError(
                "Another process of this run has ended or does not answer, so this one ends as well",
                got=said.splitlines()[0][:200],
                do="look for the first error among the processes' messages; continue with --ckpt_path last",
            )
        error = error.__cause__ or error.__context__
    return None


def run_trainer(arguments: list[str]) -> None:
    """Parse and run a command of the Trainer's."""
    prepare()
    from rlif_lightning.cli.trainer import RLIFCLI

    RLIFCLI.run(arguments)


def prepare() -> None:
    """Get ready for recipes."""
    quiet()
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # class paths in recipes may name the user's own files


def quiet() -> None:
    """Silence what users of this package can do nothing about."""
    import logging

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "10")  # a log file needs few pictures of a bar
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # about calls that Lightning makes
    # bitsandbytes, which peft imports, looks for a faster 4-bit kernel; 4-bit works without it.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    noise = ("litlogger", "Tip:", "TPU available", "💡", "`Trainer.fit` stopped")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: not any(x in record.getMessage() for x in noise)
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


def discard_run_folder(folder: Path) -> None:
    """Remove the folder of a run that failed before it wrote anything, so that it takes no number.

    Folders above that are left empty go as well. Anything but settings and empty event files keeps it.
    """
    if not folder.is_dir():
        return
    files = [f for f in folder.rglob("*") if f.is_file()]
    if any(f.name not in ("config.yaml", "hparams.yaml") and "tfevents" not in f.name for f in files):
        return
    shutil.rmtree(folder, ignore_errors=True)
    for above in list(folder.parents)[:2]:  # of the recipe, of all runs
        try:
            above.rmdir()
        except OSError:
            return
