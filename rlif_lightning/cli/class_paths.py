"""Classes that recipes name by path: what there is, and what comes nearest to a name that is not."""

import difflib
import inspect
from collections.abc import Iterator
from importlib import import_module
from typing import Any, get_args


def classes_in(hint: Any) -> Iterator[type]:
    """Every class in a type hint."""
    if inspect.isclass(hint):
        yield hint
    for part in get_args(hint):
        yield from classes_in(part)


def parameters_of(path: str) -> list[str]:
    """The settings of a class by its path; none where it can't be imported."""
    module, _, name = path.rpartition(".")
    try:
        parameters = inspect.signature(getattr(import_module(module), name)).parameters
    except (ImportError, AttributeError, TypeError, ValueError):
        return []
    return [p for p in parameters if p not in ("self", "params", "args", "kwargs")]


def example_of(base: str) -> str | None:
    """A class path that would have been right for a base class of ours."""
    room = {"Reward": "rewards", "Sampler": "sampling"}.get(base)
    if room is None:
        return None
    names = {"Reward": "SelfCertainty", "Sampler": "NativeSampler"}
    return f"for example rlif_lightning.{room}.{names[base]}"


def similar_class(path: str, key: str, parser: Any) -> str | None:
    """The class nearest to one that does not exist: beside it, or among those that the setting takes."""
    module, _, name = path.rpartition(".")
    action = next((a for a in parser._actions if a.dest == key), None)
    known: dict[str, str] = {}
    for base in classes_in(getattr(action, "_typehint", None)):
        for cls in _subclasses(base):
            known[cls.__name__] = f"{_public(cls)}.{cls.__name__}"
    try:
        beside = import_module(module) if module else None
    except ImportError:
        beside = None
    if beside is not None:
        known |= {n: f"{module}.{n}" for n, v in vars(beside).items() if inspect.isclass(v) and not n.startswith("_")}
    near = difflib.get_close_matches(name, known, 1)
    return f"did you mean {known[near[0]]}?" if near else None


def _subclasses(base: type) -> Iterator[type]:
    if base.__module__ == "builtins" or base.__module__.startswith("torch.nn"):
        return
    if base.__name__ == "Sampler":  # a protocol has no subclasses to ask for
        from rlif_lightning.sampling import NativeSampler, VLLMSampler

        yield from (NativeSampler, VLLMSampler)
    cls: type
    for cls in base.__subclasses__():
        if not inspect.isabstract(cls) and not cls.__name__.startswith("_"):
            yield cls
        yield from _subclasses(cls)


def _public(cls: type) -> str:
    """The shortest module that offers the class."""
    parts = cls.__module__.split(".")
    for end in range(1, len(parts)):
        module = ".".join(parts[:end])
        try:
            if getattr(import_module(module), cls.__name__, None) is cls:
                return module
        except ImportError:
            break
    return cls.__module__
