"""The command line: ``rlif fit | validate | test | predict`` and the commands that need no Trainer."""

import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from typing import Any

from rlif_lightning.cli.command_table import COMMANDS, TRAINER
from rlif_lightning.cli.completion import completion
from rlif_lightning.cli.given_names import check_names, spelled_out
from rlif_lightning.cli.help_text import short_help
from rlif_lightning.cli.recipes import given_recipes, recipe_path, shipped_recipes
from rlif_lightning.errors import UserError, did_you_mean, escaped, known_failure
from rlif_lightning.runs.signals import handled
from rlif_lightning.version import __version__


def main(args: Sequence[str] | None = None) -> None:
    """Run a command; a user's mistake prints its message and exits with 2."""
    arguments = list(sys.argv[1:] if args is None else args)
    try:
        with redirect_stdout(Cleaned(sys.stdout)), redirect_stderr(Unread(sys.stderr)), handled():
            dispatch(arguments)
    except BrokenPipeError:
        # The reader went away (rlif ... | head): end quietly, as other tools do.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None  # 128 + SIGPIPE, which Windows has not
    except KeyboardInterrupt:  # where signals are not ours to take
        print("\nStopped.", file=sys.stderr)
        raise SystemExit(130) from None  # 128 + SIGINT
    except Exception as error:
        known = known_failure(error)
        if known is None:
            raise
        print(f"error: {known}", file=sys.stderr, flush=True)
        raise SystemExit(known.code) from None


class Wrapped:
    """A stream that behaves like another one but where it is written to."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Cleaned(Wrapped):
    """A stream through which texts of others reach a terminal without acting on it."""

    def write(self, text: str) -> int:
        """Write what is printable of a text, and the rest by its numbers."""
        return int(self._stream.write(escaped(text)))


class Unread(Wrapped):
    """A stream of messages that need no reader: a training goes on where `tee` or a terminal has gone."""

    def write(self, text: str) -> int:
        """Write a text, or drop it and all that follow."""
        try:
            self._stream.write(text)
            self._stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
        return len(text)


def dispatch(arguments: list[str]) -> None:
    """Run the command that the first word names; its module, and with it torch, is only imported now."""
    first, *rest = arguments or ["--help"]
    if first in ("-h", "--help"):
        print(overview())
        if not arguments:
            raise SystemExit(2)
    elif first == "--version":
        print(f"rlif-lightning {__version__}")
    elif first == "--print_completion":
        print(completion(rest))
    elif first in COMMANDS:
        _run(first, rest)
    else:
        raise _unknown_command(first)


def _run(command: str, words: list[str]) -> None:
    """Answer what needs no framework, else import the command's module and run it."""
    module = COMMANDS[command].module
    if module == TRAINER and words in (["--help"], ["-h"]):
        print(short_help(command))
        raise SystemExit(0)
    if module == TRAINER:
        words = spelled_out(words)
        check_names(command, words)
        for recipe in given_recipes(words):
            recipe_path(recipe)
        if sys.stderr.isatty() and not {"--help", "-h", "--print_config"} & set(words):
            print(f"rlif {command}: loading PyTorch and Lightning ...", file=sys.stderr, flush=True)
    import_module(module).main([command, *words] if module == TRAINER else words)


def overview() -> str:
    """The commands, each in a line."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {command.purpose}" for name, command in COMMANDS.items())
    return f"""RL from internal feedback: train a language model on its own confidence, without labels.

usage: rlif COMMAND [--config RECIPE ...] [--setting VALUE ...]

{commands}

Settings of a command: rlif COMMAND --help
First try: rlif fit --config quickstart"""


def _unknown_command(word: str) -> UserError:
    known = ", ".join(COMMANDS)
    if word.startswith("-"):
        return UserError("The command comes first", got=word, do=f"rlif fit {word} ...; commands: {known}")
    do = did_you_mean(word, COMMANDS, "rlif {}".format) or did_you_mean(
        word, shipped_recipes(), "rlif fit --config {}".format, 0.8
    )
    return UserError(f"No command is called '{word}'", expected=f"one of {known}", do=do)
