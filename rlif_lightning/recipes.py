"""Shipped recipes by name, and a parser that answers a typo in three lines."""

import difflib
import re
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile
from lightning.pytorch.cli import LightningArgumentParser

from rlif_lightning.cli import users_mistake
from rlif_lightning.errors import UserError


def shipped_recipes() -> dict[str, str]:
    """Name to path of every shipped recipe."""
    folder = files("rlif_lightning.configs")
    return {
        Path(item.name).stem: str(item)
        for item in sorted(folder.iterdir(), key=lambda f: f.name)
        if item.name.endswith(".yaml")
    }


def recipe_path(value: str) -> str:
    """The file that a value of --config means: a path if it has a separator or a suffix, else a shipped name.

    Raises:
        UserError: Neither exists.
    """
    if "/" in value or "\\" in value or Path(value).suffix:
        if not Path(value).is_file():
            near = difflib.get_close_matches(Path(value).stem, shipped_recipes(), 1)
            raise UserError(
                "The recipe file does not exist",
                got=value,
                do=f"check the path, or take the shipped recipe '{near[0]}'" if near else "check the path",
            )
        return value
    recipes = shipped_recipes()
    if value not in recipes:
        near = difflib.get_close_matches(value, recipes, 1, cutoff=0.4)
        raise UserError(
            f"No recipe is called '{value}'" + (f"; did you mean '{near[0]}'?" if near else ""),
            expected=f"one of {', '.join(recipes)}, or the path of a YAML file",
        )
    return recipes[value]


class RecipeFile(ActionConfigFile):
    """``--config`` that takes paths and shipped names."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Apply a recipe."""
        self.apply_config(parser, cfg, self.dest, recipe_path(values))


class Parser(LightningArgumentParser):
    """No abbreviations; errors in three lines with a suggestion."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["allow_abbrev"] = False
        super().__init__(*args, **kwargs)

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        """As in the base class; ``--config`` learns the shipped names."""
        if kwargs.get("action") is ActionConfigFile:
            kwargs["action"] = RecipeFile
            kwargs["help"] = f"A YAML file or a shipped recipe: {', '.join(shipped_recipes())}. Later ones win."
        return super().add_argument(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong, the nearest right name, and where to look; exit with 2."""
        mistake = users_mistake(ex)
        if mistake is not None:
            raise mistake
        parser = getattr(ex, "subcommand_parser", None) or self
        print(f"error: {_first_sentence(message)}", file=sys.stderr)
        near = _nearest(message, _known_keys(parser))
        if near:
            print(f"  did you mean: {near}", file=sys.stderr)
        print(f"  all settings: {parser.prog.replace(' [options]', '')} --help", file=sys.stderr)
        raise SystemExit(2)


def _known_keys(parser: Any) -> list[str]:
    return sorted({o for action in parser._actions for o in action.option_strings if o.startswith("--")})


def _first_sentence(message: str) -> str:
    """The message in one line of bearable length."""
    lines = [line.strip(" -") for line in message.splitlines() if line.strip(" -")]
    text = " ".join(lines[:2])
    return text if len(text) <= 300 else text[:297] + "..."


def _nearest(message: str, keys: list[str]) -> str | None:
    """The known setting or class nearest to the one that the message complains of."""
    words = [w.strip("\"'`") for w in re.findall(r"--[\w.]+|[\"'`][\w.\-]+[\"'`]", message)]
    for word in words:
        option = word if word.startswith("--") else f"--{word}"
        if option in keys:
            continue
        near = difflib.get_close_matches(option, keys, 1, cutoff=0.6)
        if near:
            return near[0]
        classes = _class_paths()
        near = difflib.get_close_matches(word.split(".")[-1], classes, 1, cutoff=0.6)
        if near:
            return classes[near[0]]
    return None


def _class_paths() -> dict[str, str]:
    """Short name to class path of what recipes choose by class path."""
    from rlif_lightning import rewards, sampling

    return {name: f"{room.__name__}.{name}" for room in (rewards, sampling) for name in room.__all__}
