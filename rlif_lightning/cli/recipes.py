"""Shipped recipes by name, and a parser that answers a typo in three lines."""

import difflib
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import yaml
from jsonargparse import ActionConfigFile, ArgumentError
from lightning.pytorch.cli import LightningArgumentParser

from rlif_lightning.cli.parse_errors import Recipe, explain
from rlif_lightning.errors import UserError
from rlif_lightning.main import users_mistake


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


def forget_replaced_sources(settings: Any, recipe: Path) -> None:
    """Drop from the settings each source of which a recipe names another path: it describes other data.

    Args:
        settings: Those read so far, a namespace of jsonargparse.
        recipe: The file that is applied next.
    """
    try:
        content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    except yaml.YAMLError:
        return  # the parser says what is wrong
    sources = content.get("data") if isinstance(content, dict) else None
    for split, source in sources.items() if isinstance(sources, dict) else ():
        earlier = settings.get(f"data.{split}.init_args.path")
        if isinstance(source, dict) and source.get("path") not in (None, earlier):
            settings[f"data.{split}"] = None


class RecipeFile(ActionConfigFile):
    """``--config`` that takes paths and shipped names."""

    opened: ClassVar[list[Recipe]] = []
    """The files of this command line in their order, to say where a mistake stands."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Apply a recipe."""
        path = recipe_path(values)
        self.opened.append(Recipe(str(values), Path(path).absolute()))
        try:
            forget_replaced_sources(cfg, Path(path))
            self.apply_config(parser, cfg, self.dest, path)
        except UnicodeDecodeError as error:
            raise UserError(f"The recipe {path} is no UTF-8 text", got=error.reason, do="save it as UTF-8") from error


class Parser(LightningArgumentParser):
    """No abbreviations; errors in three lines with a suggestion."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["allow_abbrev"] = False
        super().__init__(*args, **kwargs)
        self._given: list[str] = []

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        """As in the base class; ``--config`` learns the shipped names."""
        if kwargs.get("action") is ActionConfigFile:
            kwargs["action"] = RecipeFile
            kwargs["help"] = f"A YAML file or a shipped recipe: {', '.join(shipped_recipes())}. Later ones win."
        return super().add_argument(*args, **kwargs)

    def parse_args(self, args: Any = None, *rest: Any, **kwargs: Any) -> Any:
        """As in the base class; the recipes of an earlier call are forgotten."""
        if self.exit_on_error:
            RecipeFile.opened.clear()
            self._given = list(args or [])
        return super().parse_args(args, *rest, **kwargs)

    def format_help(self, *args: Any) -> str:
        """Without the pages of usage that repeat every setting."""
        self.usage = f"{self.prog.replace(' [options]', '')} [--config RECIPE ...] [--setting VALUE ...]"
        return super().format_help(*args)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong, where, and the nearest right name, in three lines at most.

        Raises:
            UserError: Always, but for the parsers of single values: the caller may know another reading.
        """
        mistake = users_mistake(ex)
        if mistake is not None:
            raise mistake
        if not self.exit_on_error:
            raise ArgumentError(None, message) from ex
        raise explain(message, self._command_parser(ex), RecipeFile.opened) from None

    def _command_parser(self, ex: Exception | None) -> Any:
        """The parser whose settings the message is about: the command's, where it is known."""
        action = getattr(self, "_subcommands_action", None)
        given = next(iter(self._given), "")
        choices = getattr(action, "choices", None) or {}
        return getattr(ex, "subcommand_parser", None) or choices.get(given) or self
