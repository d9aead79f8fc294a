"""What the type hints of settings take: values in words, classes by path, and the settings of those classes."""

import dataclasses
import inspect
from collections.abc import Callable, Iterable
from importlib import import_module
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser, _typehints

from rlif_lightning.cli.user_classes import is_users

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "a mapping"}
WORDS |= {list: "a list", Iterable: "a list", NoneType: "null"}


class Settings(NamedTuple):
    """The settings of a command, or of a class that a setting of the command names."""

    hints: dict[str, Any]
    required: list[str]
    key: str = ""  # the setting that names the class
    owner: str = ""  # the class, if it has a path


def settings_of(parser: Any, key: str = "", owner: str = "") -> Settings:
    """The settings of a parser; groups of settings are none themselves."""
    actions = {a.dest: a for a in parser._actions if a.option_strings and a.dest.split(".")[-1] != "help"}
    single = {n: a for n, a in actions.items() if not any(other.startswith(f"{n}.") for other in actions)}
    hints = {name: getattr(action, "_typehint", None) for name, action in single.items()}
    return Settings(hints, [name for name, action in single.items() if action.required], key, owner)


def settings_of_class(cls: type, key: str, skip: int = 0) -> Settings:
    """The settings of a class, but for its first arguments, which others give."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, skip={skip} if skip else set(), fail_untyped=False)
    return settings_of(parser, key, "" if dataclasses.is_dataclass(cls) else cls.__name__)


def accepts(hint: Any, value: Any) -> bool:
    """Whether jsonargparse takes a value."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    try:
        parser.parse_object({"value": value})
    except BaseException as error:  # a class path's module may raise anything
        if not is_users(error):
            raise
        return False
    return True


def parts_of(hint: Any) -> list[Any]:
    """The members of a union, nested ones included; any other hint alone."""
    if get_origin(hint) not in (Union, UnionType):
        return [hint]
    return [part for member in get_args(hint) for part in parts_of(member)]


def describe(hint: Any) -> list[str]:
    """What a hint takes besides classes, in words; the values of a literal."""
    words = []
    for part in parts_of(hint):
        origin = get_origin(part) or part
        if origin is Literal:
            words += [str(value) for value in get_args(part)]
        elif origin is tuple:
            words.append(f"a list of {len(get_args(part))} values")
        elif origin in WORDS:
            words.append(WORDS[origin])
    return sorted(dict.fromkeys(words), key=lambda word: word == "null")


def item_of(hint: Any) -> Any:
    """The hint of a list's items; None where the hint takes no list."""
    return next((get_args(p)[0] for p in parts_of(hint) if get_origin(p) in (list, Iterable)), None)


def is_list_of_classes(hint: Any) -> bool:
    """Whether a hint takes null and a list of classes."""
    return NoneType in parts_of(hint) and base_of(item_of(hint))[0] is not None


def dataclass_of(hint: Any) -> Any:
    """The dataclass that a hint takes, None where it takes none."""
    return next(filter(dataclasses.is_dataclass, parts_of(hint)), None)


def hint_within(hint: Any, names: Iterable[str]) -> Any:
    """The hint of a setting in the dataclass that a hint takes: of ``train``, that of answers, completion."""
    for part in names:
        source = dataclass_of(hint)
        hint = None if source is None else get_type_hints(source).get(part)
    return hint


def base_of(hint: Any) -> tuple[Any, int]:
    """The class that a class path must name or extend, and how many arguments others give; (None, 0): none is."""
    for part in parts_of(hint):
        if get_origin(part) is Callable:
            return get_args(part)[-1], len(get_args(part)[0])
        if inspect.isclass(part) and part not in WORDS and not dataclasses.is_dataclass(part):
            return part, 0
    return None, 0


def package_of(base: type) -> str:
    """The package that offers a base class and those that extend it."""
    return base.__module__.rpartition(".")[0] or base.__module__


def classes_in(module: str) -> dict[str, type]:
    """The classes of a module by name; none where there is no such module. Raises whatever the module raises."""
    if not all(part.isidentifier() for part in module.split(".")):
        return {}
    try:
        return {name: found for name, found in vars(import_module(module)).items() if inspect.isclass(found)}
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module}.".startswith(f"{error.name}."):
            return {}
        raise


def offered_classes(base: type, module: str | None = None) -> dict[str, str]:
    """Name to path of the classes in a module that fit; None: in the base class's package."""
    place = package_of(base) if module is None else module
    return {name: f"{place}.{name}" for name, cls in classes_in(place).items() if extends(cls, base)}


def _path_by_name(base: Any, name: str) -> str:
    """The path of a class; one that is named alone is the one that the base class's package offers.

    jsonargparse alone knows no classes of a protocol, and refuses a name that two imported packages have.
    """
    for cls in base if isinstance(base, tuple) else (base,):
        if "." not in name and inspect.isclass(cls):
            name = offered_classes(cls).get(name, name)
    return _path_by_jsonargparse(base, name)


_path_by_jsonargparse = _typehints.resolve_class_path_by_name
_typehints.resolve_class_path_by_name = _path_by_name  # type: ignore[assignment]


def extends(cls: type, base: Any) -> bool:
    """Whether a class is a usable one of the base class, or has what a protocol asks for."""
    if getattr(base, "_is_protocol", False):
        methods = {name for name, value in vars(base).items() if callable(value) and not name.startswith("_")}
        return cls is not base and all(hasattr(cls, name) for name in methods)
    return issubclass(cls, base) and not inspect.isabstract(cls) and cls is not base


def missing_methods(cls: type, base: type) -> list[str]:
    """The methods, as ``name(arguments)``, that a class derived from an abstract one has not defined."""
    names = sorted(getattr(cls, "__abstractmethods__", ())) if base in cls.__mro__[1:] else []
    return [f"{name}({', '.join(inspect.signature(getattr(cls, name)).parameters)})" for name in names]
