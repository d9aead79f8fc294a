"""The parser of recipes and settings: shipped names, mistakes in three lines, help about a word."""

import json
from functools import partial
from itertools import accumulate
from typing import Any, ClassVar, NoReturn

import yaml
from jsonargparse import ActionConfigFile, ArgumentError, Namespace
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_warn

from rlif_lightning.cli import recipes, strangers
from rlif_lightning.cli import type_hints as hints
from rlif_lightning.cli.help_text import arrange_help
from rlif_lightning.cli.parse_errors import MistakeFinder
from rlif_lightning.cli.printed_config import PrintConfig
from rlif_lightning.cli.removed import drop_removed
from rlif_lightning.cli.strict_yaml import is_no_text
from rlif_lightning.cli.user_classes import is_users
from rlif_lightning.errors import users_mistake
from rlif_lightning.runs.atomic import replacing


class RecipeFile(ActionConfigFile):
    """``--config`` that takes paths and shipped names."""

    opened: ClassVar[list[tuple[str, Any]]] = []
    """Name and YAML nodes of the recipes of this command line in their order, to say where a mistake stands."""
    shortened: ClassVar[str | None] = None
    """The text of the recipe that is applied, where settings are taken out of it."""
    strange: ClassVar[dict[str, Any]] = {}
    """Settings of a run's config.yaml that were taken out because they name classes of other packages."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Apply a recipe."""
        path = recipes.recipe_path(values)
        recipe = recipes.read_recipe(str(values), path)
        dropped = drop_removed(recipe, training=parser.prog.endswith((" fit", " mix")))
        if dropped:
            rank_zero_warn(f"{values} holds settings that were removed and change nothing here: {', '.join(dropped)}")
        if strangers.is_strange(parser.prog, path, parser._given):
            RecipeFile.strange = strangers.drop_strange(recipe, parser)
        emptied = recipes.drop_empty_groups(recipe, parser.groups or ())
        RecipeFile.shortened = yaml.serialize(recipe) if dropped or emptied or self.strange else None
        self.opened.append((str(values), recipe))
        recipes.forget_replaced_sources(cfg, recipe)
        recipes.forget_replaced_lists(cfg, recipe)
        self.apply_config(parser, cfg, self.dest, path)
        RecipeFile.shortened = None


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
            names = ", ".join(recipes.shipped_recipes())
            kwargs["help"] = f"A YAML file or a shipped recipe: {names}. Later ones win."
        if args == ("--print_config",):
            kwargs["action"] = PrintConfig
        return super().add_argument(*args, **kwargs)

    def parse_args(self, args: Any = None, *rest: Any, **kwargs: Any) -> Any:
        """As in the base class; recipes come before all other words, and those of an earlier call are forgotten."""
        if self.exit_on_error:
            RecipeFile.opened.clear()
            RecipeFile.strange = {}
            self._given = list(args or [])
            if self._subcommands_action is None:
                first, others = recipes.recipes_first(self._given)
                args = [*first, *self._sources_as_json(others)]
        try:
            parsed = super().parse_args(args, *rest, **kwargs)
        except BaseException as error:  # a module that a class path names may raise anything
            if not isinstance(error, Exception) and not is_users(error):
                raise
            self.error(str(error), error)
        if any(not isinstance(parsed.get(group, parsed), Namespace) for group in self.groups or ()):
            self.error("A group of settings was given as one value")  # which the base class lets through
        return parsed

    def _sources_as_json(self, words: list[str]) -> list[str]:
        """The words; of a source, a text that YAML would take for something else is given as JSON.

        A list of classes comes after a null: it inherits nothing from one as long before it, as in a recipe.
        """
        given: list[str] = []
        setting = ""
        for word in words:
            name, equals, value = word.partition("=") if word.startswith("--") else (setting, "", word)
            source = next((s for s in accumulate(name.split("."), "{}.{}".format) if self._typehint(s)), name)
            own = name.removeprefix(f"{source}.").split(".")
            if value.startswith("[") and hints.is_list_of_classes(self._typehint(name)) and _names_all(value):
                given.insert(len(given) if equals else -1, f"{name}=null")
            hint = hints.hint_within(self._typehint(source), own)
            if str in hints.parts_of(hint) and is_no_text(value, partial(hints.accepts, hint)):
                if not equals:
                    given.pop()
                whole: Any = value
                for part in reversed(own):
                    whole = {part: whole}
                word = f"{source}={json.dumps(whole)}"
            given.append(word)
            setting = word if word.startswith("--") and not equals else ""
        return given

    def _typehint(self, option: str) -> Any:
        return getattr(self._option_string_actions.get(option), "_typehint", None)

    def parse_string(self, content: str, *args: Any, **kwargs: Any) -> Any:
        """As in the base class, without settings that were removed."""
        return super().parse_string(RecipeFile.shortened or content, *args, **kwargs)

    def save(self, cfg: Any, path: Any, **kwargs: Any) -> None:
        """As in the base class, whole or not at all."""
        with replacing(path) as file:
            super().save(cfg, file.name, **kwargs | {"overwrite": True})

    def format_help(self, *args: Any) -> str:
        """The settings that were asked for; the pages of usage that repeat every setting are left out."""
        self.usage = f"{self.prog.replace(' [options]', '')} [--config RECIPE ...] [--setting VALUE ...]"
        asked = self._given[-1] if self._given and not self._given[-1].startswith("-") else None
        arrange_help(self, asked)
        return super().format_help(*args)

    def error(self, message: str, ex: BaseException | None = None) -> NoReturn:
        """Raise what is wrong, where, and the nearest right name; a value's own parser leaves this to its caller."""
        mistake = users_mistake(ex)
        if mistake is not None:
            raise mistake
        if not self.exit_on_error:
            raise ArgumentError(None, message) from ex
        parser = self._command_parser()
        raise MistakeFinder(parser).explain(message, RecipeFile.opened, parser._given) from None

    def _command_parser(self) -> "Parser":
        """The parser whose settings the message is about: that of the command."""
        choices = getattr(getattr(self, "_subcommands_action", None), "choices", None) or {}
        return choices.get(next(iter(self._given), ""), self)


def _names_all(items: str) -> bool:
    """Whether a list on the command line names classes, and not only settings of those that are there."""
    return "{" not in items or "class_path" in items
