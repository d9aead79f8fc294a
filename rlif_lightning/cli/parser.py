"""The parser of recipes and settings: shipped names, mistakes in three lines, help with what matters first."""

from typing import Any, ClassVar, NoReturn

from jsonargparse import ActionConfigFile, ArgumentError, Namespace
from lightning.pytorch.cli import LightningArgumentParser

from rlif_lightning.cli.help_text import arrange_help
from rlif_lightning.cli.parse_errors import MistakeFinder
from rlif_lightning.cli.recipes import forget_replaced_sources, recipe_path, shipped_recipes
from rlif_lightning.errors import UserError, users_mistake


class RecipeFile(ActionConfigFile):
    """``--config`` that takes paths and shipped names."""

    opened: ClassVar[list[tuple[str, str]]] = []
    """Name and text of the recipes of this command line in their order, to say where a mistake stands."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Apply a recipe."""
        path = recipe_path(values)
        try:
            with open(path, encoding="utf-8") as file:
                self.opened.append((str(values), file.read()))
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text", got=error.reason, do="save it as UTF-8") from error
        forget_replaced_sources(cfg, self.opened[-1][1])
        self.apply_config(parser, cfg, self.dest, path)


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
        parsed = super().parse_args(args, *rest, **kwargs)
        if any(not isinstance(parsed.get(group, parsed), Namespace) for group in self.groups or ()):
            self.error("A group of settings was given as one value")  # which the base class lets through
        return parsed

    def format_help(self, *args: Any) -> str:
        """The settings that matter most come first; the pages of usage that repeat every setting are left out."""
        self.usage = f"{self.prog.replace(' [options]', '')} [--config RECIPE ...] [--setting VALUE ...]"
        arrange_help(self, everything=self._given[-1:] == ["all"])
        return super().format_help(*args)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
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
