"""Shipped recipes by name, and recipes that replace what earlier recipes said."""

import re
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from rlif_lightning.cli.strict_yaml import compose, entries
from rlif_lightning.errors import UserError, did_you_mean


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
        near = did_you_mean(Path(value).stem, recipes, "the shipped recipe '{}'".format)
        raise UserError("The recipe file does not exist", got=value, do=near or "check the path")
    if value in recipes:
        return recipes[value]
    expected = f"one of {', '.join(recipes)}, or the path of a YAML file"
    raise UserError(f"No recipe is called '{value}'", expected=expected, do=did_you_mean(value, recipes, repr))


def read_recipe(name: str, path: str) -> Any:
    """The YAML nodes of a recipe. Refused is what is no text or no YAML, holds no settings, or holds one twice."""
    try:
        with open(path, encoding="utf-8") as file:
            root = compose(file.read())
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text", got=error.reason, do="save it as UTF-8") from error
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", error)
        place = f"{name}, line {mark.line + 1}" if mark else name
        raise UserError(f"{place}: not valid YAML: {problem}", do="correct that line") from error
    if not isinstance(root, yaml.MappingNode):
        wrong = "the recipe is empty" if root is None else "the recipe holds no settings"
        raise UserError(f"{name}: {wrong}", expected="a YAML mapping, such as rollout: {group_size: 8}")
    return root


def drop_empty_groups(recipe: Any, groups: Iterable[str]) -> bool:
    """Take out of a recipe (YAML) the groups that hold no settings, such as ``rollout:``; whether there was one."""
    kept = [(name, node) for name, node in recipe.value if name.value not in groups or not node.tag.endswith(":null")]
    recipe.value, before = kept, recipe.value
    return len(kept) < len(before)


def forget_replaced_sources(settings: Any, recipe: Any) -> None:
    """Drop from the settings read so far each source of which the next recipe names another path: other data."""
    for split, source in entries(entries(recipe).get("data")).items():
        path = entries(source).get("path")
        earlier = settings.get(f"data.{split}.init_args.path")
        if path is not None and not path.tag.endswith(":null") and path.value != earlier:
            settings[f"data.{split}"] = None


def forget_replaced_lists(settings: Any, recipe: Any) -> None:
    """Drop from the settings read so far each list of which the next recipe gives all items anew.

    jsonargparse would hand the settings of the earlier items on to those of a list that is as long.
    """
    for group, node in entries(recipe).items():
        for name, value in entries(node).items():
            if not isinstance(value, yaml.SequenceNode) or f"{group}.{name}" not in settings:
                continue
            if all("class_path" in entries(item) or isinstance(item, yaml.ScalarNode) for item in value.value):
                settings[f"{group}.{name}"] = None


def recipes_first(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of a command line that give recipes, and all others: these win, wherever they stand."""
    recipes: list[str] = []
    others: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        if word in ("--config", "-c") and left and not left[0].startswith("-"):
            recipes += [word, left.pop(0)]
        elif word.startswith("--config=") or re.match("-c.", word):
            recipes.append(word)
        else:
            others.append(word)
    return recipes, others


def given_recipes(words: Sequence[str]) -> list[str]:
    """The recipes that a command line names, in their order."""
    named = (re.sub("^(--config=|-c=?)", "", word) for word in recipes_first(words)[0] if word != "--config")
    return [name for name in named if name]
