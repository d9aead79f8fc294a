"""What differs between the settings of a run and those that it continues with."""

import json
import textwrap
from collections.abc import Iterator
from typing import Any

import yaml


def read_settings(text: str) -> dict[str, Any]:
    """What a config.yaml says; empty where it is damaged."""
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def changed_settings(was: Any, now: Any, name: str = "") -> Iterator[str]:
    """What differs between two versions of config.yaml, as ``model.kl_coefficient 0.005 -> 0.02``."""
    if isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        was, now = ({f"[{n}]": value for n, value in enumerate(values)} for values in (was, now))
    if isinstance(was, dict) and isinstance(now, dict) and was.get("class_path") == now.get("class_path"):
        for key in {**was, **now}:
            if name or key not in ("ckpt_path", "runs", "config"):
                inner = name if key == "init_args" else f"{name}.{key}".lstrip(".").replace(".[", "[")
                yield from changed_settings(was.get(key), now.get(key), inner)
    elif was != now:
        yield f"{name} {_shown(was)} -> {_shown(now)}"


def _shown(value: Any) -> str:
    value = value.get("class_path", value) if isinstance(value, dict) else value
    return textwrap.shorten(value if isinstance(value, str) else json.dumps(value, default=str), 60)
