"""Settings of a run that somebody else may have made: those that name classes of strange packages are left out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

from rlif_lightning.cli import type_hints as hints
from rlif_lightning.runs.folder import CONFIG

PACKAGES = ("rlif_lightning", "torch", "lightning")
TRUST = "--trust_run"
COMMANDS = ("export", "plan", "sample")  # which need no classes of others to do their work


def is_strange(command: str, path: str, words: Sequence[str]) -> bool:
    """Whether a recipe is the config.yaml of a run that the words of a command do not trust."""
    return command.rpartition(" ")[2] in COMMANDS and Path(path).name == CONFIG and TRUST not in words


def add_trust(parser: Any) -> None:
    """Add the flag."""
    text = "Import classes that a run's config.yaml names from other packages: that runs their code."
    parser.add_argument(TRUST, action="store_true", help=text)


def drop_strange(recipe: Any, parser: Any) -> dict[str, Any]:
    """Take out of a recipe (YAML) what names classes of other packages; returns names and values."""
    known = hints.settings_of(parser).hints
    with_class = {
        name for name, hint in known.items() if hints.base_of(hint)[0] or hints.base_of(hints.item_of(hint))[0]
    }
    dropped: dict[str, Any] = {}

    def walk(node: Any, name: str) -> None:
        for pair in list(node.value):
            full = f"{name}.{pair[0].value}".strip(".")
            if _names_class(pair[1], full in with_class):
                dropped[full] = get_loader("yaml")(yaml.serialize(pair[1]))
                node.value.remove(pair)
            elif isinstance(pair[1], yaml.MappingNode):
                walk(pair[1], full)

    walk(recipe, "")
    return dropped


def _names_class(node: Any, is_class: bool) -> bool:
    """Whether a value, or for a list an item or anything in it, is a class of another package."""
    if isinstance(node, yaml.SequenceNode):
        return any(_names_class(item, is_class) or _holds_class(item) for item in node.value)
    if isinstance(node, yaml.MappingNode):
        return any(name.value == "class_path" and _names_class(value, True) for name, value in node.value)
    return is_class and "." in node.value and node.value.partition(".")[0] not in PACKAGES


def _holds_class(node: Any) -> bool:
    """Whether there is such a class anywhere below a node."""
    parts = [value for _, value in node.value] if isinstance(node, yaml.MappingNode) else []
    return any(_names_class(part, False) or _holds_class(part) for part in parts)
