"""Names and shapes of a model's weights against those that a file holds."""

from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches

from torch import Tensor

Shapes = Mapping[str, Sequence[int]]


def shapes(weights: Mapping[str, Tensor]) -> Shapes:
    """Of weights by name."""
    return {name: weight.shape for name, weight in weights.items()}


def misfit(own: Shapes, stored: Shapes) -> str:
    """How stored weights differ from a model's own, with one example and their number; empty where they fit.

    What is missing comes first, then another shape, then what the model does not have.
    """
    missing, spare = sorted(own.keys() - stored.keys()), sorted(stored.keys() - own.keys())
    other = sorted(name for name in own.keys() & stored.keys() if list(own[name]) != list(stored[name]))
    if missing:
        near = nearest(missing[0], spare)
        instead = "" if near is None else f"; the most similar name there is {near}"
        return f"{len(missing)} missing, such as {missing[0]}{instead}"
    if other:
        name = other[0]
        return f"{len(other)} of another shape, such as {name} {list(stored[name])}, in the model {list(own[name])}"
    return f"{len(spare)} too many, such as {spare[0]}: no such weight in the model" if spare else ""


def nearest(name: str, others: Collection[str]) -> str | None:
    """The most similar of some names: the same with something in front, else by its letters; None of none."""
    longer = [other for other in others if other.endswith(f".{name}")]
    return min(longer, key=len) if longer else next(iter(get_close_matches(name, others, 1, 0.0)), None)
