"""Settings of earlier versions, in recipes and in the config.yaml of earlier runs."""

from typing import Any

from rlif_lightning.cli.strict_yaml import entries

REMOVED = {
    "probe.action": ("auto", "it is called memory_check.action now"),
    "model.dropout": ("false", "leave it out: dropout is always off"),
    "model.plain_forward": ("false", "leave it out: it was there for tests"),
    "model.attn_implementation": ("null", "set attn_implementation in the model folder's config.json instead"),
    "guard.lag": ("0", "leave it out: the best step's weights are handed back"),
    "completions.show": ("4", "leave it out: TensorBoard shows the first four completions"),
    "sampler.plain": ("false", "leave it out: it was there for tests"),
    "sampler.dtype": ("auto", "write it below the sampler's engine: engine: {dtype: float32}"),
    "sampler.enforce_eager": ("null", "write it below the sampler's engine: engine: {enforce_eager: false}"),
}
"""Name to the value with which it changed nothing, as YAML, and what to do instead."""


def what_to_do(setting: str) -> str | None:
    """What to do instead of a setting that was removed, by its whole name; None for another."""
    return next((do for name, (_, do) in REMOVED.items() if f".{name}." in f".{setting}."), None)


def drop_removed(recipe: Any, training: bool) -> list[str]:
    """Take out of a recipe (YAML) what was removed, for a training only what changed nothing; returns the names."""
    dropped = []
    for name, (unused, _) in REMOVED.items():
        group, _, setting = name.partition(".")
        settings: Any = entries(recipe).get(group)
        value = entries(settings).get(setting)
        if value is not None and (value.value == unused or not training):
            settings.value = [pair for pair in settings.value if pair[0].value != setting]
            recipe.value = [pair for pair in recipe.value if pair[1] is not settings or settings.value]
            dropped.append(name)
    return dropped
