"""YAML in which nothing is lost without a word: what stands twice is an error, with both lines."""

import re
import sys
from collections.abc import Callable
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
MOST_NODES = 10_000  # names and values of a text, those that aliases repeat included; recipes have some hundreds
ODD_NUMBER = re.compile("[-+]?0[0-9_]|.*:")
MOST_DIGITS = sys.int_info.default_max_str_digits


def compose(text: str) -> Any:
    """The nodes of a text, merge keys (<<) resolved; None where it holds nothing.

    A YAMLError where it is not YAML, a setting stands twice, an anchor holds itself, or it is too long.
    """
    try:
        root = yaml.compose(text, LOADER)
        _check(root, (), {})
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error
    return root


def entries(node: Any) -> dict[str, Any]:
    """Name to value of a mapping; nothing for another node."""
    return {name.value: value for name, value in node.value} if isinstance(node, yaml.MappingNode) else {}


def is_no_text(text: str, accepts: Callable[[Any], bool]) -> bool:
    """Whether YAML takes a text for a comment (``# 1``), or for a mapping (``Q: 1``) or list that is not accepted."""
    try:
        node = yaml.compose(text, LOADER)
        if node is None:
            return bool(text.strip())
        return isinstance(node, yaml.CollectionNode) and not accepts(_load(text))
    except yaml.YAMLError:
        return False


def _check(node: Any, above: tuple[int, ...], sizes: dict[int, int]) -> int:
    """Refuse what is wrong with a node or anything in it; returns how many nodes it is with aliases written out."""
    if id(node) in above:
        raise _error("an anchor holds itself", node)
    if id(node) in sizes or node is None:
        return sizes.get(id(node), 0)
    if node.tag not in yaml.SafeLoader.yaml_constructors and not node.tag.endswith((":merge", ":value")):
        raise _error(f"an unknown tag, {node.tag}", node)
    if isinstance(node, yaml.ScalarNode):
        if node.tag.endswith(":int") and len(node.value) > MOST_DIGITS:
            raise _error(f"a number of {len(node.value)} digits", node)
        if node.tag.endswith(":int") and ODD_NUMBER.match(node.value):
            raise _error(f"{node.value} is a number to base 8 or 60: write it plainly or in quotes", node)
        return 1
    is_mapping = isinstance(node, yaml.MappingNode)
    parts = [part for pair in node.value for part in pair] if is_mapping else node.value
    size = sizes[id(node)] = 1 + sum(_check(part, (*above, id(node)), sizes) for part in parts)
    if size > MOST_NODES:
        raise _error(f"{size:,} values, aliases written out", node)
    if is_mapping:
        _refuse_repeated(node.value)
        yaml.constructor.SafeConstructor().flatten_mapping(node)
        node.value = list({str(name.value): (name, value) for name, value in node.value}.values())  # own ones win
    return size


def _refuse_repeated(pairs: list[tuple[Any, Any]]) -> None:
    """Refuse a name that stands twice; ``a: {b: 1}`` and ``a.b: 2`` are the same setting, ``a`` and ``a+`` too."""
    for i, (name, value) in enumerate(pairs):
        if not isinstance(name, yaml.ScalarNode):
            raise _error("a name is not a word", name)
        for other, its_value in pairs[:i]:
            short, long = sorted((str(n.value).removesuffix("+") for n in (name, other)), key=len)
            group = value if short == name.value else its_value
            if short == long or (long.startswith(f"{short}.") and isinstance(group, yaml.MappingNode)):
                raise _error(f"'{short}' stands twice, here and in line {other.start_mark.line + 1}", name)


def _error(problem: str, node: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _load(text: str) -> Any:
    compose(text)
    return _load_leniently(text)


_load_leniently = get_loader("yaml")
set_loader("yaml", _load, (yaml.YAMLError,))
