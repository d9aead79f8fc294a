"""What is wrong with a command line, and where: an unknown setting, an unknown class or a wrong value.

jsonargparse refuses words in an English of its own, without a line. So recipes and words are walked once more here,
against the settings and their type hints; wrong is what jsonargparse refuses when it is given alone.
"""

import re
from collections.abc import Iterable, Sequence
from functools import partial
from textwrap import shorten
from types import NoneType
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, get_loader

from rlif_lightning.cli import type_hints as hints
from rlif_lightning.cli.help_text import ALIASES
from rlif_lightning.cli.recipes import shipped_recipes
from rlif_lightning.cli.removed import what_to_do
from rlif_lightning.cli.strict_yaml import compose
from rlif_lightning.cli.user_classes import failure, is_users
from rlif_lightning.errors import UserError, did_you_mean

Pairs = Iterable[tuple[Any, Any]]  # nodes of names and values
CLASS_PATH = re.compile(r"(\w+\.)*[A-Z]\w*$")
one_line = partial(shorten, width=300, placeholder=" ...")


class MistakeFinder:
    """Walks what was given to a command's parser in its order and raises the first mistake."""

    def __init__(self, parser: Any) -> None:
        self.parser, self.settings = parser, hints.settings_of(parser)
        self.recipe: str | None = None  # which one is walked; None: the command line
        self.node: Any = None  # the name or the value that is looked at
        self.given: set[str] = set()
        self.chosen: dict[str, str] = {}  # setting -> the class path that it was given last
        self.needed: dict[str, UserError] = {}  # settings without which the command can't run or a class be made
        for name in self.settings.required:
            do = f"give --{name}, or a recipe with --config"
            self.needed[name] = self._mistake(f"The setting --{name} is missing", do=do)

    def explain(self, message: str, recipes: Sequence[tuple[str, Any]], words: Sequence[str]) -> UserError:
        """Say in at most three lines what the user can act upon; else the message of jsonargparse, shortened.

        Recipes are pairs of name and YAML, in their order; the words are those after the command.
        """
        try:
            for self.recipe, root in recipes:
                self._check_settings(root.value, self.settings)
            self.recipe = None
            self._walk_words(list(words))
        except UserError as mistake:
            return mistake
        missing = [mistake for name, mistake in self.needed.items() if name not in self.given]
        lines = [line.strip(" -") for line in message.splitlines() if line.strip(" -")]
        return missing[0] if missing else self._mistake(" ".join(lines[:2]))

    def _walk_words(self, words: list[str]) -> None:
        """Every ``--a.b value`` is looked at like ``a: {b: value}`` in a recipe."""
        while words:
            word, equals, value = words.pop(0).partition("=")
            if not word.startswith("-"):
                near = did_you_mean(word, shipped_recipes(), "--config {}".format, 0.8)
                do = near or "settings begin with --: --rollout.group_size 8"
                raise self._mistake(f"The word '{word}' belongs to no setting", do=do)
            if word.endswith(".help") and words:  # --rollout.rewards.help CLASS
                word = f"{word.removesuffix('.help')}+"
            action = self.parser._option_string_actions.get(word)
            if action is not None and action.nargs is not None:  # --help, --print_config, or several values
                while action.nargs == "+" and words and not words[0].startswith("--"):
                    self._check_settings(_pairs(action.dest, words.pop(0)), self.settings)
                continue
            missing = not equals and (not words or words[0].startswith("--"))
            text = "" if missing else value if equals else words.pop(0)
            if not isinstance(action, ActionConfigFile) and not (action is not None and missing):
                self._check_settings(_pairs(word.removeprefix("--"), text), self.settings)
            if missing:
                raise self._mistake(f"The setting {word} has no value", do=f"write {word} VALUE")

    def _check_settings(self, pairs: Pairs, known: hints.Settings, prefix: str = "") -> None:
        for self.node, value in pairs:
            self._check_setting(prefix + self.node.value, value, known)

    def _check_setting(self, name: str, node: Any, known: hints.Settings) -> None:
        """Look at one setting or a group of them; a name with + adds to a list."""
        single = name.removesuffix("+")
        key = f"{known.key}.{single}" if known.key else single
        inner = next((other for other in known.hints if other.startswith(f"{name}.")), None)
        if single in known.hints:
            self.given.add(key)
            hint = known.hints[single]
            self._check_value(key, node, (single != name and hints.item_of(hint)) or hint)
        elif inner is None:
            raise self._unknown_setting(name, node, known)
        elif isinstance(node, yaml.MappingNode):
            self._check_settings(node.value, known, f"{name}.")
        else:
            raise self._takes_settings(key, node, inner)

    def _unknown_setting(self, name: str, node: Any, known: hints.Settings) -> UserError:
        while isinstance(node, yaml.MappingNode) and node.value:
            self.node, node = node.value[0]
            name += f".{self.node.value}"
        whole = f"{known.key}.{name}".strip(".")
        if removed := what_to_do(whole):
            return self._mistake(f"There is no setting {whole} any more", do=removed)
        if known.key:
            do = did_you_mean(name, known.hints) or f"it has {', '.join(known.hints)}"
            return self._mistake(f"{known.key} has no setting '{name}'{known.owner and ' for ' + known.owner}", do=do)
        dashes = "" if self.recipe or name.startswith("-") else "--"
        if name in ALIASES:
            return self._mistake(f"No setting is called '{dashes}{name}'", f"did you mean {dashes}{ALIASES[name]}?")
        return self._mistake(
            f"No setting is called '{dashes}{name}'", did_you_mean(name, known.hints, f"{dashes}{{}}".format)
        )

    def _takes_settings(self, key: str, node: Any, first: str) -> UserError:
        self.node, value = node, _value(node)
        do = f"did you mean {first}: {value}?" if self.recipe else f"did you mean --{first} {value}?"
        return self._mistake(f"{key} takes settings, not '{value}'", do=do)

    def _check_class(self, key: str, node: Any, base: Any, skip: int) -> None:
        """Look at a class path and its ``init_args``; on the command line each may come alone."""
        parts: list[tuple[Any, Any]] = node.value if isinstance(node, yaml.MappingNode) else []
        if isinstance(node, yaml.CollectionNode) and not parts:
            raise self._wrong_value(key, node, base)
        named = {name.value: value for name, value in parts}
        at = self.node = named.get("class_path", node)
        known = hints.settings_of_class(self._find_class(key, base), key, skip)
        given = named.get("init_args")
        arguments = list(given.value) if isinstance(given, yaml.MappingNode) else []
        if given is not None and not isinstance(given, yaml.MappingNode):
            raise self._mistake(f"{key}: init_args takes settings, not '{_value(given)}'", "write {name: value}")
        for self.node, value in parts:
            if self.node.value in ("class_path", "init_args", "dict_kwargs"):
                continue
            if self.recipe or "class_path" in named:
                wrong = f"{key} takes class_path and init_args, not '{self.node.value}'"
                raise self._mistake(wrong, do="write it below init_args")
            arguments.append((self.node, value))
        self._check_settings(arguments, known)
        self.node = at
        for name in set(known.required) - {name.value for name, _ in arguments}:
            do = f"give --{key}.{name} VALUE, or {name} below init_args in a recipe"
            self.needed.setdefault(
                f"{key}.{name}", self._mistake(f"{key}: {known.owner} needs its setting '{name}'", do=do)
            )

    def _find_class(self, key: str, base: Any) -> type:
        offered, path = hints.offered_classes(base), self.chosen.get(key)
        if path is None:
            raise self._mistake(f"{key}: the class comes before its settings", expected=_examples(base))
        module, _, name = offered.get(path, path).rpartition(".")
        try:
            found = hints.classes_in(module).get(name)
        except BaseException as error:
            if not is_users(error):
                raise
            raise self._mistake(*failure(key, module, "imported", error)) from error
        if found is None:
            offered |= hints.offered_classes(base, module)
            do = did_you_mean(name, offered, offered.__getitem__) or "give the whole path: package.module.Class"
            raise self._mistake(f"{key}: there is no class '{path}'", do=do)
        if not hints.extends(found, base):
            lacks = hints.missing_methods(found, base)
            if lacks:
                raise self._mistake(f"{key}: the class {path} lacks a method", do=f"define {', '.join(lacks)}")
            raise self._mistake(f"{key}: {path} is no {base.__name__}", expected=_examples(base))
        return found

    def _check_value(self, key: str, node: Any, hint: Any) -> None:
        """Find what jsonargparse refuses of a value: all of it, an item, a class, or a setting of that class."""
        self._remember_class(key, node)
        if isinstance(node, yaml.MappingNode):
            self.given |= {f"{key}.{name.value}" for name, _ in node.value}
        if hint is None or hints.accepts(hint, _value(node)):
            return
        item, is_mapping = hints.item_of(hint), isinstance(node, yaml.MappingNode)
        source = hints.dataclass_of(hint)
        base, skip = hints.base_of(item if is_mapping and item else hint)
        if item is not None and isinstance(node, yaml.SequenceNode):
            for part in node.value:
                if _value(part) is None and NoneType not in hints.parts_of(item):
                    raise self._wrong_value(key, part, item)
                self._check_value(key, part, item)
        elif source is not None:
            known = hints.settings_of_class(source, key)
            if not is_mapping:
                raise self._takes_settings(key, node, f"{key}.{next(iter(known.hints))}")
            for name in known.required:
                lack = self._mistake(f"The setting {key}.{name} is missing", do=f"give --{key}.{name} VALUE")
                self.needed.setdefault(f"{key}.{name}", lack)
            self._check_settings(node.value, known)
        elif base is not None and (
            is_mapping or CLASS_PATH.match(str(_value(node))) or not set(hints.describe(hint)) - {"a list", "null"}
        ):
            self._check_class(key, node, base, skip)
        else:
            raise self._wrong_value(key, node, hint)

    def _remember_class(self, key: str, node: Any) -> None:
        last = node.value[-1] if isinstance(node, yaml.SequenceNode) and node.value else node
        if isinstance(last, yaml.MappingNode):
            last = next((value for name, value in last.value if name.value == "class_path"), last)
        if isinstance(last, yaml.ScalarNode):
            self.chosen[key] = last.value
            self.needed = {name: lack for name, lack in self.needed.items() if not name.startswith(f"{key}.")}

    def _wrong_value(self, key: str, node: Any, hint: Any) -> UserError:
        self.node, value, takes = node, _value(node), hints.describe(hint)
        said = "null" if value is None else str(value)
        one_class = hints.base_of(hints.item_of(hint))[0] and not hints.base_of(hint)[0]
        if "a list" in takes and one_class and "[" not in said:
            do = f"write {key}: [{said}]" if self.recipe else f"did you mean --{key}=[{said}]?"
            return self._mistake(f"{key} takes a list, not '{said}'", do=do)
        advice = did_you_mean(said, takes)
        if isinstance(node, yaml.ScalarNode) and not isinstance(value, str) and hints.accepts(hint, node.value):
            advice = f"put it into quotes: '{node.value}'"  # YAML takes off for false, 123 for a number
        try:
            compose(said)
        except yaml.YAMLError as error:
            advice = f"correct it: {getattr(error, 'problem', error)}"
        base = hints.base_of(hint)[0]
        expected = " or ".join(filter(None, [", ".join(takes[:-1]), *takes[-1:]])) or (base and _examples(base))
        said = said if len(said) < 200 else f"{said[:80]} ... {said[-80:]}"
        return self._mistake(f"{key} can't be '{said}'", advice, expected=expected)

    def _mistake(self, wrong: str, do: Any = None, *, expected: str | None = None) -> UserError:
        """What is wrong with the node that is looked at; the help is named where there is nothing else to do."""
        if self.recipe:
            wrong = f"{self.recipe}, line {self.node.start_mark.line + 1}: {wrong}"
        do = do or (None if expected else f"see {self.parser.prog.replace(' [options]', '')} --help")
        return UserError(one_line(wrong), expected=expected and one_line(expected), do=do and one_line(do))


def _examples(base: type) -> str:
    return f"one of {hints.package_of(base)}: {', '.join(hints.offered_classes(base))}"


def _value(node: Any) -> Any:
    """As jsonargparse gets it: a word of the command line as it is."""
    return node.word if hasattr(node, "word") else get_loader("yaml")(yaml.serialize(node))


def _pairs(key: str, text: str) -> Pairs:
    """A setting of the command line as YAML; values are taken apart where they are lists or mappings."""
    node: Any
    try:
        node = compose(text)
    except yaml.YAMLError:
        node = None
    if not isinstance(node, yaml.CollectionNode):
        node = yaml.ScalarNode("tag:yaml.org,2002:str", text)
    node.word = text
    for name in reversed(key.split(".")):
        node = yaml.MappingNode("tag:yaml.org,2002:map", [(yaml.ScalarNode("tag:yaml.org,2002:str", name), node)])
    return node.value
