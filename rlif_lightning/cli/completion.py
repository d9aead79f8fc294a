"""Completion of commands, settings, recipes and run folders in a shell, written by shtab; nothing heavy is imported.

jsonargparse's own knows the values of settings too, and is a script of 50 MB for these parsers.
"""

import argparse
from typing import Any

from rlif_lightning.cli.command_table import COMMANDS
from rlif_lightning.cli.given_names import SHORT, UNUSED, is_unused
from rlif_lightning.cli.recipes import shipped_recipes
from rlif_lightning.cli.setting_names import setting_names
from rlif_lightning.errors import UserError

RECIPES = "_rlif_recipes"


def completion(words: list[str]) -> str:
    """The script for a shell, which the only word names."""
    try:
        import shtab
    except ImportError as error:
        raise UserError("Completion is written by shtab, which is not installed", do="pip install shtab") from error
    if len(words) != 1 or words[0] not in shtab.SUPPORTED_SHELLS:
        expected = f"one of {', '.join(shtab.SUPPORTED_SHELLS)}"
        raise UserError("Completion is written for a shell", got=" ".join(words) or None, expected=expected)
    known = f'{RECIPES}() {{ compgen -W "{" ".join(shipped_recipes())}" -- "$1"; compgen -f -- "$1"; }}'
    write: Any = shtab.complete  # whose type hints lack the mapping that it takes
    return str(write(_parser(shtab), words[0], root_prefix="rlif", preamble={"bash": known}))


def _parser(shtab: Any) -> argparse.ArgumentParser:
    """The commands with the names of what they use."""
    parser = argparse.ArgumentParser("rlif")
    commands = parser.add_subparsers()
    for command, (_, purpose) in COMMANDS.items():
        own = commands.add_parser(command, help=purpose, add_help=False)
        if command in UNUSED:
            names = [*setting_names(), *SHORT]
            used = [name for name in names if not is_unused(command, SHORT.get(name, name)) and name != "config"]
            for name in used:
                own.add_argument(f"--{name}")
        if command in ("export", "sample", "report"):
            run: Any = own.add_argument("RUN", nargs="*")
            run.complete = shtab.DIRECTORY
        if command != "report":
            config: Any = own.add_argument("--config")
            config.complete = {**shtab.FILE, "bash": RECIPES}
    return parser
