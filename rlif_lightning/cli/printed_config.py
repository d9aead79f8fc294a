"""``--print_config``: the settings as a recipe, each with a line about it."""

import re
import textwrap
from typing import Any

import yaml
from jsonargparse import ArgumentParser
from jsonargparse._actions import _ActionPrintConfig

from rlif_lightning.cli import type_hints as hints
from rlif_lightning.cli.help_text import OUR_WORDS, WITHIN

WIDTH = 118


class PrintConfig(_ActionPrintConfig):
    """``--print_config`` that explains what it prints."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.metavar = "[=FLAGS]"  # that of the base class begins with a backspace

    def __call__(self, parser: Any, *args: Any, **kwargs: Any) -> None:
        """Ask the parser to print once all is read."""
        super().__call__(parser, *args, **kwargs)
        while hasattr(parser, "parent_parser"):
            parser = parser.parent_parser
        parser.print_config["subparser"] = _Explained(parser.print_config["subparser"])


class _Explained:
    """A parser that dumps settings with comments."""

    def __init__(self, parser: Any) -> None:
        self.parser = parser

    def dump(self, *args: Any, **kwargs: Any) -> str:
        return with_comments(self.parser.dump(*args, **kwargs), help_texts(self.parser))


def help_texts(parser: Any) -> dict[str, str]:
    """Name to help text of a parser's settings, those of data sources included."""
    texts = {name.replace(".lr", ".init_args.lr"): text for name, text in WITHIN.items()} | _texts_of(parser)
    for action in parser._actions:
        source = hints.dataclass_of(getattr(action, "_typehint", None))
        if source is not None:
            own = ArgumentParser(exit_on_error=False)
            own.add_class_arguments(source, fail_untyped=False)
            texts |= {f"{action.dest}.{name}": text for name, text in _texts_of(own).items()}
    return texts | OUR_WORDS


def _texts_of(parser: Any) -> dict[str, str]:
    groups = parser.groups or ()
    return {a.dest: a.help for a in parser._actions if isinstance(a.help, str) and a.dest not in groups}


def with_comments(recipe: str, texts: dict[str, str]) -> str:
    """A recipe in YAML with a comment above each setting that has a text; within a group each text comes once."""
    said = set[tuple[str, str]]()
    notes: dict[int, str] = {}

    def walk(node: Any, prefix: str) -> None:
        for key, value in node.value:
            name, place = f"{prefix}{key.value}", key.start_mark
            text = re.sub(r"(:\w+:)?`+", "`", texts.get(name, "").replace("%%", "%"))
            if text and (name.partition(".")[0], text) not in said:
                said.add((name.partition(".")[0], text))
                short = textwrap.shorten(f"# {text}", WIDTH - place.column, placeholder=" ...")
                notes[place.line] = " " * place.column + short
            if isinstance(value, yaml.MappingNode):
                walk(value, f"{name}.")

    root = yaml.compose(recipe)
    if isinstance(root, yaml.MappingNode):
        walk(root, "")
    lines = enumerate(recipe.splitlines())
    return "".join(f"{notes[n]}\n{line}\n" if n in notes else f"{line}\n" for n, line in lines)
