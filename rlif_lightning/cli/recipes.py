"""Shipped recipes by name."""

import difflib
from importlib.resources import files
from pathlib import Path

from rlif_lightning.errors import UserError


def shipped_recipes() -> dict[str, str]:
    """Name to path of every shipped recipe."""
    paths = sorted(str(item) for item in files("rlif_lightning.configs").iterdir() if item.name.endswith(".yaml"))
    return {Path(path).stem: path for path in paths}


def recipe_path(value: str) -> str:
    """The file that a value of --config means: a path if it has a separator or a suffix, else a shipped name.

    Raises:
        UserError: Neither exists.
    """
    recipes = shipped_recipes()
    if "/" in value or "\\" in value or Path(value).suffix:
        if not Path(value).is_file():
            near = difflib.get_close_matches(Path(value).stem, recipes, 1)
            raise UserError(
                "The recipe file does not exist",
                got=value,
                do=f"check the path, or take the shipped recipe '{near[0]}'" if near else "check the path",
            )
        return value
    if value not in recipes:
        near = difflib.get_close_matches(value, recipes, 1, cutoff=0.4)
        raise UserError(
            f"No recipe is called '{value}'" + (f"; did you mean '{near[0]}'?" if near else ""),
            expected=f"one of {', '.join(recipes)}, or the path of a YAML file",
        )
    return recipes[value]
