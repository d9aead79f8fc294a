"""The model card of an export: what was trained, on what, how far, and what came of it."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlif_lightning.models.hub import is_local, resolve_model
from rlif_lightning.runs.folder import METRICS
from rlif_lightning.runs.metrics_csv import Curves
from rlif_lightning.runs.summary import SUMMARY_METRICS, best_step, load_guard, load_run, short_number
from rlif_lightning.toy import parse_toy_name

LONGEST = 4000  # characters of a text that is quoted whole


@dataclass(frozen=True)
class Export:
    """What the card is about.

    Attributes:
        settings: Of the run, as in its config.yaml.
        run: The run's folder; None for a checkpoint outside of one.
        step: Optimiser steps that the weights have behind them.
        source: Where the weights come from, in words.
        form: merged or adapter.
        dtype: Of the weights, by name.
        check: What the comparison with the policy has found, in words.
        end_tokens: What ends a completion.
        prompt_differs: Whether ``apply_chat_template`` gives other tokens than training did.
        versions: Of the libraries.
        picture: File name of the run's curves, where it has any.
    """

    settings: dict[str, Any]
    run: Path | None
    step: int
    source: str
    form: str
    dtype: str
    check: str
    end_tokens: list[str]
    prompt_differs: bool
    versions: dict[str, str]
    picture: str | None = None


def model_card(export: Export, name: str | None = None) -> str:
    """The card as Markdown with its YAML header.

    Args:
        export: What it is about.
        name: Of its repository on the hub.
    """
    parts = [
        _header(export),
        f"# {_plain(name or base_label(export.settings['model']['name']))}",
        _what(export),
        _section("Method", _table(_method(export.settings))),
        _section("Data", _table(_data(export.settings))),
        _section("Result", *_result(export)),
        _section("Prompt", *_prompt(export)),
        _section("Use", fenced(_example(export, name), "python")),
        _section("Check", export.check),
        _section("Versions", ", ".join(f"{key} {value}" for key, value in export.versions.items())),
    ]
    return "\n\n".join(parts) + "\n"


# -- quoting: names, templates and data are others' texts -----------------------------------------------------------


def fenced(text: str, language: str = "") -> str:
    """A text as a code block that nothing in it can end; cut where it is very long."""
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]}\n... ({len(text) - LONGEST} more characters)"
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def code(value: object, longest: int = 200) -> str:
    """A value as code within a line or a table's cell."""
    text = " ".join(str(value).split()).replace("|", "\\|")
    text = text if len(text) <= longest else f"{text[:longest]}..."
    fence = "`" * (1 + max(map(len, re.findall(r"`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}" if text else ""


def _plain(text: str) -> str:
    """A name outside of code: no markup, one line."""
    return re.sub(r"[^\w./: +-]", "", " ".join(text.split()))[:100]


# -- the parts --------------------------------------------------------------------------------------------------


def _header(export: Export) -> str:
    model = export.settings["model"]
    base = model["name"]
    rewards = [_class_name(r["class_path"]) for r in _rewards(export.settings)]
    header: dict[str, Any] = {
        "library_name": "transformers" if export.form == "merged" else "peft",
        "pipeline_tag": "text-generation",
        "tags": ["rlif", "rlif-lightning", "reinforcement-learning", model["loss"], *rewards],
    }
    if parse_toy_name(base) is None and not is_local(base):
        header["base_model"] = base
        header["base_model_relation"] = "finetune" if export.form == "merged" else "adapter"
    license_name = _license(base)
    if license_name is not None:
        header["license"] = license_name
    return f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True).strip()}\n---"


def _license(base: str) -> str | None:
    """What the base model's card names, where it lies on this machine."""
    if parse_toy_name(base) is not None:
        return "apache-2.0"  # made by this package
    path: Any = Path(resolve_model(base)) / "README.md"
    if not is_local(base):
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(base, "README.md")
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
        found = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else None
    except (OSError, TypeError, IndexError, yaml.YAMLError):  # TypeError: not in the cache
        return None
    value = found.get("license") if isinstance(found, dict) else None
    return value[:100] if isinstance(value, str) else None


def _what(export: Export) -> str:
    base = code(base_label(export.settings["model"]["name"]))
    form = {
        "merged": f"a whole model in {export.dtype}",
        "adapter": "a PEFT adapter: it needs its base model",
    }[export.form]
    return (
        f"{base} after {export.step} optimiser steps of reinforcement learning with rlif-lightning; {form}. "
        f"The weights are {export.source}."
    )


def base_label(name: str) -> str:
    """A base model's name without the folders of the machine that it lay on."""
    if parse_toy_name(name) is None and is_local(name):
        return f".../{Path(name).expanduser().name}"
    return name


def _rewards(settings: dict[str, Any]) -> list[dict[str, Any]]:
    rewards = settings["rollout"]["rewards"] or [{"class_path": "rlif_lightning.rewards.SelfCertainty"}]
    return [{"class_path": r} if isinstance(r, str) else r for r in rewards]


def _class_name(path: str) -> str:
    return path.rpartition(".")[2]


def _call(item: dict[str, Any]) -> str:
    given = {key: value for key, value in (item.get("init_args") or {}).items() if value is not None}
    return f"{_class_name(item['class_path'])}({', '.join(f'{key}={value}' for key, value in given.items())})"


def _method(settings: dict[str, Any]) -> list[tuple[str, object]]:
    model, rollout, trainer = settings["model"], settings["rollout"], settings["trainer"]
    kl = model["kl_coefficient"]
    optimizer = model["optimizer"]
    return [
        ("reward", "; ".join(map(_call, _rewards(settings)))),
        ("loss", f"{model['loss']}, clip {model['clip_low']} / {model['clip_high']}"),
        ("KL term", f"{kl} x {model['kl_estimator']}, reference {model['reference']}" if kl else "none"),
        ("entropy bonus", model["entropy_coefficient"] or None),
        ("optimizer", optimizer if isinstance(optimizer, str) else _call(optimizer)),
        ("schedule", f"{model['schedule']}, warm-up {model['warmup_ratio']}"),
        ("LoRA", model["lora"]),
        ("started from adapter", model.get("adapter") and base_label(model["adapter"])),
        ("quantization while training", model.get("quantization")),
        ("precision", trainer["precision"] or "32-true"),
        ("prompts x completions per step", f"{rollout['prompts_per_step']} x {rollout['group_size']}"),
        (
            "sampling",
            f"temperature {rollout['temperature']}, top_k {rollout['top_k']}, top_p {rollout['top_p']}, "
            f"min_p {rollout['min_p']}, at most {rollout['max_new_tokens']} tokens",
        ),
        ("seed", settings["seed_everything"]),
    ]


def _data(settings: dict[str, Any]) -> list[tuple[str, object]]:
    def source(name: str) -> str | None:
        found = settings["data"][name]
        if not found:
            return None
        path = found["path"]
        short = f".../{Path(path).name}" if is_local(path) else path
        hub = parse_toy_name(path) is None and not is_local(path)
        more = [str(found[key]) for key in ("subset", "split") if hub and found[key]]
        first = [f"the first {found['limit']} rows"] if found["limit"] else []
        return ", ".join([short, *more, *first])

    return [("training", source("train")), ("held out", source("val"))]


def _table(rows: list[tuple[str, object]]) -> str:
    return "\n".join(
        ["| | |", "|---|---|", *(f"| {key} | {code(value)} |" for key, value in rows if value is not None)]
    )


def _result(export: Export) -> list[str]:
    if export.run is None or not (export.run / METRICS).is_file():
        return ["The run's metrics were not at hand."]
    curves = load_run(export.run)
    rows = [row for metric, has_best in SUMMARY_METRICS if (row := _row(curves, metric, has_best, export.step))]
    head = [f"| metric | start | best | at step | exported (step {export.step}) |", "|---|---|---|---|---|"]
    return [
        "\n".join(head + rows),
        _verdict(export.run),
        *([f"![Curves of the run]({export.picture})"] * bool(export.picture)),
    ]


def _row(curves: Curves, metric: str, has_best: bool, step: int) -> str | None:
    """Start, best and the value at the exported step, or at the last one before it that was measured."""
    curve = curves.get(metric)
    if not curve:
        return None
    best = best_step(curve) if has_best else None
    known = [n for n in curve if n <= step]
    here = "" if not known else short_number(curve[max(known)])
    note = f" (at step {max(known)})" if known and max(known) != step else ""
    cells = (metric, short_number(curve[min(curve)]), "" if best is None else short_number(curve[best]))
    return "| " + " | ".join([*cells, "" if best is None else str(best), here + note]) + " |"


def _verdict(run: Path) -> str:
    guard = load_guard(run)
    if guard is None:
        return "Collapse guard: off."
    if guard["fired"] is None:
        return f"Collapse guard: it did not fire; the best step by its signals was {guard['best_step']}."
    return (
        f"Collapse guard: fired {guard['fired']['reason']}. It hands back the weights of step "
        f"{guard['handed_back_step']}."
    )


def _prompt(export: Export) -> list[str]:
    data = export.settings["data"]
    ends = ", ".join(map(code, export.end_tokens))
    parts = [
        f"A completion ends with one of: {ends}. The chat template of this folder writes the prompt of training: "
        "one message of the user in, the same tokens out."
    ]
    if export.prompt_differs:
        parts = [
            f"A completion ends with one of: {ends}. **The chat template of this folder does not give exactly the "
            "tokens of training**: this tokenizer reads the text in one piece differently. Put the problem into the "
            "template below and tokenize that."
        ]
    if data["template"] not in (None, "chat"):
        parts += ["Template:", fenced(data["template"])]
    if data["system_prompt"]:
        parts += ["System prompt, added where a conversation brings none:", fenced(data["system_prompt"])]
    return parts


def _example(export: Export, name: str | None) -> str:
    imports, load = {
        "merged": ("from transformers import AutoModelForCausalLM, AutoTokenizer", "AutoModelForCausalLM"),
        "adapter": (
            "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer",
            "AutoPeftModelForCausalLM",
        ),
    }[export.form]
    return f"""{imports}

name = "{name or "the path of this folder"}"
tokenizer = AutoTokenizer.from_pretrained(name)
model = {load}.from_pretrained(name, dtype="auto")
prompt = tokenizer.apply_chat_template(
    [{{"role": "user", "content": "..."}}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
output = model.generate(**prompt, max_new_tokens={export.settings["evaluation"]["max_new_tokens"]})[0]
print(tokenizer.decode(output[prompt["input_ids"].shape[1] :], skip_special_tokens=True))"""


def _section(title: str, *parts: str) -> str:
    return "\n\n".join([f"## {title}", *parts])
