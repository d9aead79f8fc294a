"""Shipped recipes by name, recipes of earlier versions, and recipes that replace what earlier recipes said."""

import difflib
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from rlif_lightning.errors import UserError

GONE = {"guard.lag": 0, "model.dropout": False, "model.plain_forward": False}
"""Settings of earlier versions and the defaults that they had, which every config.yaml of a run holds."""


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


def without_gone(text: str) -> str:
    """A recipe without the settings that are gone, where they had their defaults; others are refused later."""
    try:
        recipe = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    for key, default in GONE.items():
        group, _, name = key.partition(".")
        settings: Any = recipe.get(group) if isinstance(recipe, dict) else None
        if isinstance(settings, dict) and settings.get(name) == default and name in settings:
            del settings[name]
            text = yaml.safe_dump(recipe, allow_unicode=True, sort_keys=False)
    return text


def forget_replaced_sources(settings: Any, text: str) -> None:
    """Drop from the settings each source of which a recipe names another path: it describes other data.

    Args:
        settings: Those read so far, a namespace of jsonargparse.
        text: The recipe that is applied next.
    """
    try:
        recipe = yaml.safe_load(text)
    except yaml.YAMLError:
        return  # the parser says what is wrong
    sources = recipe.get("data") if isinstance(recipe, dict) else None
    for split, source in sources.items() if isinstance(sources, dict) else ():
        earlier = settings.get(f"data.{split}.init_args.path")
        if isinstance(source, dict) and source.get("path") not in (None, earlier):
            settings[f"data.{split}"] = None
