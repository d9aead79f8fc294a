"""Shipped recipes by name, and recipes that replace what earlier recipes said."""

import difflib
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from rlif_lightning.errors import UserError


def shipped_recipes() -> dict[str, str]:
    """Name to path of every shipped recipe."""
    paths = sorted(str(item) for item in files("rlif_lightning.configs").iterdir() if item.name.endswith(".yaml"))
    return {Path(path).stem: path for path in paths}


def recipe_path(value: str) -> str:
    """The file that a value of --config means: a path if it has a separator or a suffix, else a shipped name."""
    recipes = shipped_recipes()
    if "/" in value or "\\" in value or Path(value).suffix:
        if Path(value).is_file():
            return value
        near = difflib.get_close_matches(Path(value).stem, recipes, 1)
        do = f"check the path, or take the shipped recipe '{near[0]}'" if near else "check the path"
        raise UserError("The recipe file does not exist", got=value, do=do)
    if value in recipes:
        return recipes[value]
    near = difflib.get_close_matches(value, recipes, 1, cutoff=0.4)
    wrong = f"No recipe is called '{value}'" + (f"; did you mean '{near[0]}'?" if near else "")
    raise UserError(wrong, expected=f"one of {', '.join(recipes)}, or the path of a YAML file")


def forget_replaced_sources(settings: Any, text: str) -> None:
    """Drop from the settings read so far each source of which the next recipe names another path: other data."""
    try:
        recipe = yaml.safe_load(text)
    except yaml.YAMLError:
        return  # the parser says what is wrong
    sources = recipe.get("data") if isinstance(recipe, dict) else None
    for split, source in sources.items() if isinstance(sources, dict) else ():
        earlier = settings.get(f"data.{split}.init_args.path")
        if isinstance(source, dict) and source.get("path") not in (None, earlier):
            settings[f"data.{split}"] = None
