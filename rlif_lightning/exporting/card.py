"""The model card of an export: what was trained, on what, how far, and with what result."""

import re
import shutil
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData, metadata_load, try_to_load_from_cache
from jinja2 import Environment, StrictUndefined

from rlif_lightning.exporting.hub import is_on_hub
from rlif_lightning.models.hub import is_local, resolve_model
from rlif_lightning.runs.curves import CURVES
from rlif_lightning.runs.folder import METRICS
from rlif_lightning.runs.story import number
from rlif_lightning.runs.summary import key_curves, load_guard, load_run, start_and_best
from rlif_lightning.toy import parse_toy_name

TEMPLATE = Path(__file__).with_name("card_template.md")
LONGEST_QUOTE = 4000  # characters


def write_card(folder: Path, settings: dict[str, Any], run: Path | None, facts: dict[str, Any]) -> None:
    """Write README.md into an export, and the picture of the run's curves where there is one.

    ``settings`` are those of the run's config.yaml, ``facts`` what else the template names (it refuses a lack).
    """
    picture = None if run is None or not (run / CURVES).is_file() else run / CURVES
    if picture is not None:
        shutil.copyfile(picture, folder / CURVES)
    card = _fill_template(settings, run, facts | {"picture": picture and CURVES})
    (folder / "README.md").write_text(card, encoding="utf-8", errors="replace")


def _fill_template(settings: dict[str, Any], run: Path | None, facts: dict[str, Any]) -> str:
    rewards = settings["rollout"]["rewards"] or [{"class_path": "SelfCertainty"}]
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.keep_trailing_newline = True
    filters = {"code": code, "fenced": fenced, "call": _call, "portable": portable_name, "source": _data_source}
    environment.filters |= filters | {"plain": lambda text: re.sub(r"[^\w./: +-]", "", " ".join(text.split()))[:100]}
    known = settings | facts | {"rewards": rewards}
    known["header"] = _header(settings["model"], [_class_name(r) for r in rewards], facts["form"]).to_yaml()
    known["results"] = _results(run, facts["step"])
    known["guard"] = None if run is None else load_guard(run)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(known)


# Names, templates and data are other people's texts: nothing in them may act as Markdown.


def fenced(text: str) -> str:
    """A text as a code block that nothing in it can end; cut where it is very long."""
    if len(text) > LONGEST_QUOTE:
        text = f"{text[:LONGEST_QUOTE]}\n... ({len(text) - LONGEST_QUOTE} more characters)"
    fence = "`" * max(3, 1 + _longest_backticks(text))
    return f"{fence}\n{text}\n{fence}"


def code(value: object, longest: int = 200) -> str:
    """A value as code within a line or a table's cell."""
    text = " ".join(str(value).split()).replace("|", "\\|")
    text = text if len(text) <= longest else f"{text[:longest]}..."
    fence = "`" * (1 + _longest_backticks(text))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}" if text else ""


def _longest_backticks(text: str) -> int:
    return max(map(len, re.findall(r"`+", text)), default=0)


def portable_name(name: str) -> str:
    """The name of a model or data set without the folders of this machine."""
    is_folder = parse_toy_name(name) is None and is_local(name)
    return f".../{Path(name).expanduser().name}" if is_folder else name


def _header(model: dict[str, Any], rewards: list[str], form: str) -> ModelCardData:
    base, merged = model["name"], form == "merged"
    return ModelCardData(
        library_name="transformers" if merged else "peft",
        pipeline_tag="text-generation",
        tags=["rlif", "rlif-lightning", "reinforcement-learning", model["loss"], *rewards],
        base_model=base if is_on_hub(base) else None,
        base_model_relation=("finetune" if merged else "adapter") if is_on_hub(base) else None,
        license=_base_license(base),
    )


def _base_license(base: str) -> str | None:
    """The license in the base model's card, where that lies on this machine."""
    if parse_toy_name(base) is not None:
        return "apache-2.0"  # made by this package
    card = Path(resolve_model(base)) / "README.md" if is_local(base) else try_to_load_from_cache(base, "README.md")
    try:
        found = (metadata_load(card) or {}).get("license")  # type: ignore[arg-type]
    except (OSError, TypeError, ValueError, yaml.YAMLError):  # TypeError: not in the cache
        return None
    return found[:100] if isinstance(found, str) else None


def named_classes(rewards: Any) -> list[dict[str, Any]]:
    """The rewards of a recipe that was not trusted, those that are written as they should be."""
    items = [item for item in rewards if isinstance(item, dict)] if isinstance(rewards, list) else []
    found = [{"class_path": str(x.get("class_path")), "init_args": x.get("init_args")} for x in items]
    return [item for item in found if isinstance(item["init_args"], dict | None)]


def _class_name(item: dict[str, Any]) -> str:
    return item["class_path"].rpartition(".")[2]


def _call(item: dict[str, Any]) -> str:
    """A class with its settings, written as a call."""
    given = [f"{key}={value}" for key, value in (item.get("init_args") or {}).items() if value is not None]
    return f"{_class_name(item)}({', '.join(given)})"


def _data_source(source: dict[str, Any]) -> str:
    path = source["path"]
    parts = [str(source[key]) for key in ("subset", "split") if is_on_hub(path) and source[key]]
    parts += [f"the first {source['limit']} rows"] if source["limit"] else []
    return ", ".join([portable_name(path), *parts])


def _results(run: Path | None, step: int) -> list[list[str]] | None:
    """Cells of each metric: start, best, and the value at the exported step or the last one before it."""
    if run is None or not (run / METRICS).is_file():
        return None
    rows = []
    for metric, curve in key_curves(load_run(run)):
        last = max((n for n in curve if n <= step), default=None)
        exported = "" if last is None else number(curve[last])
        note = "" if last in (None, step) else f" (at step {last})"
        rows.append([*start_and_best(metric, curve), exported + note])
    return rows
