"""What the parser complains of, in the user's words: at most three lines, with the place and a suggestion."""

import dataclasses
import difflib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlif_lightning.cli.class_paths import classes_in, example_of, parameters_of, similar_class
from rlif_lightning.errors import UserError
from rlif_lightning.main import TRAINER_COMMANDS

TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list",
    "collections.abc.Iterable": "a list",
    "dict": "a mapping",
    "NoneType": "null",
}


class Recipe(NamedTuple):
    """A file of settings, as the user named it and where it is."""

    name: str
    path: Path


def explain(message: str, parser: Any, recipes: Sequence[Recipe] = ()) -> UserError:
    """Turn a message of jsonargparse into one that a user can act upon.

    Args:
        message: The message.
        parser: Of the command, for the names of its settings.
        recipes: Files that were read, the last one last.
    """
    text = re.sub(r"\n\s*- Expected a path but .*? either not accessible or invalid(?=\n|$)", "", message)
    keys = [k for k, _ in itertools.groupby(re.findall(r'Parser key "([^"]+)"', text))]
    key = keys[0] if keys else ""
    for rule in (
        _yaml,
        _no_mapping,
        _unknown_words,
        _missing,
        _unknown_option,
        _no_settings,
        _unknown_class,
        _wrong_value,
    ):
        found = rule(text, ".".join(keys), parser, recipes)
        if found is not None:
            return found
    lines = [line.strip(" -") for line in text.splitlines() if line.strip(" -")]
    return _complaint(" ".join(lines[:2]), parser, place=locate(recipes, key))


def known_keys(parser: Any) -> list[str]:
    """Every setting of a command, nested ones included."""
    keys = {o for action in parser._actions for o in action.option_strings if o.startswith("--")}
    for action in parser._actions:
        for cls in classes_in(getattr(action, "_typehint", None)):
            if dataclasses.is_dataclass(cls):
                keys |= {f"--{action.dest}.{f.name}" for f in dataclasses.fields(cls)}
    return sorted(keys)


def locate(recipes: Sequence[Recipe], key: str, word: str | None = None) -> str | None:
    """Where recipes set a key: ``file, line n``. With a word, the line below that key that holds it.

    None: no recipe does, so the command line must have.
    """
    import yaml

    for recipe in reversed(recipes):
        try:
            node = yaml.compose(recipe.path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            continue
        names = key.split(".") if key else []
        while node is not None and names:
            pairs = node.value if isinstance(node, yaml.MappingNode) else []
            first, node = next(((k, v) for k, v in pairs if k.value == names[0]), (None, None))
            names = names[1:]
            if first is not None and not names and word is None:
                return f"{recipe.name}, line {first.start_mark.line + 1}"
        if node is None or word is None:
            continue
        hit = next((n for n in _scalars(node) if n.value == word), None)
        if hit is not None:
            return f"{recipe.name}, line {hit.start_mark.line + 1}"
    return None


def _scalars(node: Any) -> Iterator[Any]:
    if isinstance(node.value, list):
        for item in node.value:
            for part in item if isinstance(item, tuple) else (item,):
                yield from _scalars(part)
    else:
        yield node


def _complaint(
    message: str, parser: Any, *, place: str | None = None, expected: str | None = None, do: str | None = None
) -> UserError:
    """Three lines at most: what and where, what would be right or nearest, where to read on."""
    if do is None and expected is None:
        do = f"see {parser.prog.replace(' [options]', '')} --help"
    wrong = _short(f"{place}: {message}" if place else message)
    return UserError(wrong, expected=expected and _short(expected), do=do and _short(do))


def _short(text: str) -> str:
    """One line of bearable length."""
    line = " ".join(text.split())
    return line if len(line) <= 300 else f"{line[:297]}..."


def _did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    near = difflib.get_close_matches(word, list(known), 1, cutoff)
    return f"did you mean {near[0]}?" if near else None


# -- the rules: (text, key, parser, recipes) -> the complaint, or None where the rule does not apply ----------------


def _yaml(text: str, key: str, parser: Any, recipes: Sequence[Recipe]) -> UserError | None:
    if "Problems parsing config" not in text and "Unable to load config" not in text:
        return None
    if key:
        name = key.rsplit(".", 1)[-1]
        inner = {"model": "name", "data": "train.path", "trainer": "accelerator"}.get(name)
        return _complaint(
            f"--{key} takes a YAML file with all settings of that part",
            parser,
            do=f"name single settings, such as --{key}.{inner}" if inner else f"name single settings: --{key}.<name>",
        )
    lines = re.findall(r"line (\d+), column", text)
    problem = re.split(r'\s*in "<', text.split(":", 1)[1])[0].strip() if not lines else _yaml_problem(text)
    place = ", ".join([*(r.name for r in recipes[-1:]), *(f"line {n}" for n in lines[-1:])])
    return _complaint(
        f"not valid YAML: {problem}", parser, place=place, do="mend that line: indent with spaces, not tabs"
    )


def _yaml_problem(text: str) -> str:
    """The last statement before a position is the problem; those before it say what was being read."""
    parts = [p.strip() for p in text.split(":", 1)[1].splitlines() if p.strip() and '"<' not in p]
    return parts[-1] if parts else "unknown problem"


def _no_mapping(text: str, key: str, parser: Any, recipes: Sequence[Recipe]) -> UserError | None:
    if not text.startswith("Unexpected config:"):
        return None
    got = text.split(":", 1)[1].strip()
    wrong = "holds no settings" if got else "is empty"
    return _complaint(f"the recipe {wrong}", parser, place=recipes[-1].name if recipes else None,
                      expected="a YAML mapping, such as rollout: {group_size: 8}")  # fmt: skip


def _unknown_words(text: str, key: str, parser: Any, recipes: Sequence[Recipe]) -> UserError | None:
    found = re.match(r"unrecognized arguments: (.+)", text, re.DOTALL)
    if not found:
        return None
    word = found[1].split()[0].split("=")[0]
    if word.startswith("-"):
        return _complaint(f"No setting is called '{word}'", parser, do=_did_you_mean(word, known_keys(parser)))
    from rlif_lightning.cli.recipes import shipped_recipes

    near = _did_you_mean(word, shipped_recipes(), 0.8)
    do = near.replace("mean ", "mean --config ") if near else "settings begin with --, as in --rollout.group_size 8"
    return _complaint(f"The word '{word}' belongs to no setting", parser, do=do)


def _missing(text: str, key: str, parser: Any, recipes: Sequence[Recipe]) -> UserError | None:
    found = re.search(r"following arguments are required: (\S+)", text)
    if found:
        name = found[1].strip(",")
        path = re.search(r"given class_path '([^']+)'", text)
        if path:
            cls = path[1].rpartition(".")[2]
            place = locate(recipes, key, path[1]) or locate(recipes, key, cls)
            return _complaint(f"{key}: {cls} needs its setting '{name}'", parser, place=place,
                              do=f"give --{key}.{name} VALUE, or {name} below init_args in a recipe")  # fmt: skip
        if name.partition(".")[0] in TRAINER_COMMANDS:
            name = name.partition(".")[2]
        return _complaint(f"The setting --{name} is missing", parser, do=f"give --{name}, or a recipe with --config")
    found = re.match(r"argument (?:-\w/)?(--\S+): expected (?:one|at least one) argument", text)
    return _complaint(f"The setting {found[1]} has no value", parser, do=f"write {found[1]} VALUE") if found else None


def _unknown_option(text: str, key: str, parser: Any, recipes: Sequence[Recipe]) -> UserError | None:
    found = re.search(
        r"(?:(?:Group '(?P<group>[^']+)'|Subcommand '\w+') does not accept option|Option) '(?P<name>[^']+)'", text
    )
    if not found:
        return None
    outer, name = found["group"] or key, found["name"]
    known = {k.removeprefix("--") for k in known_keys(parser)}
    if not key:  # a setting of ours: its whole name says most
        full = f"{outer}.{name}" if outer else name
        near = difflib.get_close_matches(full, known, 1)
        return _complaint(
            f"No setting is called '{full}'",
            parser,
            place=locate(recipes, full.rpartition(".")[0], full.rpartition(".")[2]),
            do=f"did you mean {near[0]}?" if near else None,
        )
    own = [k.removeprefix(f"{key}.") for k in known if k.startswith(f"{key}.") and not k.endswith(".help")]
    path = None if own else re.search(r"class_path[ =]'([\w.]+)'", text)
    own += parameters_of(path[1]) if path else []
    return _complaint(
        f"{key} has no setting '{name}'" + (f" for {path[1].split('.')[-1]}" if path else ""),
        parser,
        place=locate(recipes, key, name),
        do=_did_you_mean(name, own) or (f"it has {', '.join(own)}" if own else None),
    )


def _no_settings(text: str, key: str, parser: Any, recipes: Sequence[Recipe]) -> UserError | None:
    """A group of settings was given as one text, or a list as one item."""
    action = next((a for a in parser._actions if a.dest == key), None)
    given = re.search(r"Given value type: <class 'str'>\s+Given value: (.+)", text)
    if action is None or given is None:
        return None
    value = given[1].strip()
    place = locate(recipes, key, value)
    if place != locate(recipes, key):  # the word stands elsewhere below the key, and this one on the command line
        place = None
    for cls in classes_in(action._typehint):
        if dataclasses.is_dataclass(cls):
            first = dataclasses.fields(cls)[0].name
            return _complaint(f"{key} takes settings, not the text '{value}'", parser, place=place,
                              do=f"did you mean {key}.{first}: {value}?")  # fmt: skip
    if "Subtypes: [list[" in text and "path" not in text and not value.startswith("["):
        return _complaint(f"{key} takes a list, not '{value}'", parser, place=place,
                          do=f"did you mean --{key}=[{value}]?")  # fmt: skip
    return None


def _unknown_class(text: str, key: str, parser: Any, recipes: Sequence[Recipe]) -> UserError | None:
    several = re.search(r"Multiple subclasses with name (\w+)\. Give the full class path .*?: (.+?)\.?$", text, re.M)
    if several:
        return _complaint(f"{key}: several classes are called '{several[1]}'", parser,
                          place=locate(recipes, key, several[1]), expected=f"one of {several[2]}")  # fmt: skip
    wrong = re.search(r"Import path (\S+) does not correspond to a subclass of (\w+)", text)
    if wrong:
        return _complaint(f"{key}: {wrong[1]} is no {wrong[2]}", parser, place=locate(recipes, key, wrong[1]),
                          do=example_of(wrong[2]))  # fmt: skip
    abstract = re.search(r"instantiatable class, but (\S+) is", text)
    if abstract:
        return _complaint(f"{key}: the class comes before its settings", parser, place=locate(recipes, key),
                          do=f"give {key} a class_path first; {example_of(abstract[1].split('.')[-1])}")  # fmt: skip
    named = (
        re.search(r"Problem with given class_path '([^']+)':\s*(?:No module|module|cannot import)", text)
        or re.search(r"Expected a dot import path string: (\S+)", text)
        or re.search(r"callable class: (?:No module|module|cannot).*class_path='([^']+)'", text, re.DOTALL)
        or re.search(r"callable class: (?:No module|module|cannot).*Got value: (\S+)", text, re.DOTALL)
    )
    if not named:
        return None
    path = named[1]
    near = similar_class(path, key, parser)
    return _complaint(f"{key}: there is no class '{path}'", parser, place=locate(recipes, key, path),
                      do=near or "give the whole path: package.module.Class")  # fmt: skip


def _wrong_value(text: str, key: str, parser: Any, recipes: Sequence[Recipe]) -> UserError | None:
    block = _innermost(text)
    kinds = list(dict.fromkeys(re.findall(r"Expected an? (.+?)(?:\. Got value|$)", block, re.MULTILINE)))
    given = re.search(r"(?:Got value|Given value): (.+)", block)
    if not kinds or given is None:
        return None
    nested = re.search(r"NestedArg\(key='[^']+', val='([^']*)'\)", given[1])
    value = nested[1] if nested else given[1].strip()
    choices = list(dict.fromkeys(c for kind in kinds for c in _choices(kind)))
    words = [TYPES.get(_name(kind), _name(kind)) for kind in kinds if not _choices(kind)] + choices
    words.sort(key=lambda w: w == "null")
    near = difflib.get_close_matches(value, choices, 1)
    protocol = re.search(r"does not implement protocol (\w+)", block)
    if protocol is not None:
        return _complaint(
            f"{key}: '{value}' is no {protocol[1]}",
            parser,
            place=locate(recipes, key.rpartition(".")[0], value),
            expected=f"a class with every method of {protocol[1]}, and with its type hints",
        )
    return _complaint(
        f"{key} can't be '{value}'",
        parser,
        place=locate(recipes, key.rpartition(".")[0], value),
        expected=" or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words),
        do=f"did you mean {near[0]}?" if near else None,
    )


def _innermost(text: str) -> str:
    """What is said of the innermost setting: the lines indented below its name."""
    lines = text.splitlines()
    starts = [i for i, line in enumerate(lines) if "Parser key" in line]
    if not starts:
        return text
    first = starts[-1]
    depth = len(lines[first]) - len(lines[first].lstrip())
    below = lines[first + 1 :]
    end = next((i for i, x in enumerate(below) if x.strip() and len(x) - len(x.lstrip()) <= depth), len(below))
    return "\n".join(below[:end])


def _name(kind: str) -> str:
    return re.sub(r"<class '(.+)'>", r"\1", kind)


def _choices(kind: str) -> list[str]:
    """The values of a Literal."""
    literal = re.match(r"typing\.Literal\[(.+)\]", kind)
    return [c.strip(" '") for c in literal[1].split(",")] if literal else []
