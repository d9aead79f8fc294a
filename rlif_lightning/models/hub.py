"""Models by name: a local folder, the embedded toy, or a name on the hub; their configuration without weights."""

import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch

from rlif_lightning.errors import UserError
from rlif_lightning.toy import parse_toy_name, refuse_almost_toy, toy_model

MOST = {"layer": 1_000, "size|head|expert|dim": 10**8}
"""More of these is no model: the numbers in config.json are asked for as memory before any weight is looked at."""
TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")


def is_local(name: str) -> bool:
    """Whether a name is meant as a path rather than as a hub name."""
    return Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1


def resolve_model(name: str) -> str:
    """What transformers loads by a name: ``toy`` (built on first use), a folder that lacks nothing, or a hub name."""
    if parse_toy_name(name) is not None:
        return str(toy_model(name))
    if not is_local(name):
        refuse_almost_toy(name)
        return name
    folder = local_folder(name)
    if not any(folder.glob("*.safetensors")):
        lacks = "weights in safetensors format"
        expected, do = "model.safetensors, or model-*.safetensors with an index", "copy the weights into the folder"
        if any(folder.glob("*.bin")):
            do = "convert the .bin files with save_pretrained(); pickled weights can run code and are not loaded"
    elif not any(f for pattern in TOKENIZER_FILES for f in folder.glob(pattern)):
        lacks, expected = "tokenizer", "tokenizer.json, or what else the model's tokenizer is kept in"
        do = "copy the tokenizer's files into the folder"  # transformers would make up an empty one
    else:
        return str(folder)
    raise _lacks(folder, lacks, expected, do)


def local_folder(name: str) -> Path:
    """The folder of a model that is one, with its config.json at least."""
    folder = Path(name).expanduser()
    if folder.is_file():
        do = "give the folder that the file lies in"
        if folder.suffix == ".gguf":
            do = "give the folder or the hub name of the model that it was made from"
        expected = "a folder with config.json, a tokenizer and weights in safetensors format"
        raise UserError("The model is a file", got=folder, expected=expected, do=do)
    if not folder.is_dir():
        raise UserError("The model folder does not exist", got=folder, do="check --model.name")
    if (folder / "adapter_config.json").is_file():  # transformers would load it too, without a word
        do = "give it as --model.adapter, and its base model, in a folder of its own, as --model.name"
        raise UserError("The model folder holds an adapter", got=folder, do=do)
    if not (folder / "config.json").is_file():
        raise _lacks(folder, "config.json", "a folder written by save_pretrained()", "check --model.name")
    _check_sizes(folder, _json(folder / "config.json"))
    files = _json(folder / "model.safetensors.index.json").get("weight_map")
    for file in sorted({str(file) for file in files.values()} if isinstance(files, dict) else ()):
        if Path(file).name != file:
            do = "give only models whose files lie in their folder"
            raise UserError("The model's index names a file outside of its folder", got=f"{folder}: {file}", do=do)
    return folder


def _json(file: Path) -> Any:
    """A mapping in a file; empty where there is none, which loading the model will tell."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _check_sizes(folder: Path, config: dict[str, Any]) -> None:
    for name, value in config.items():
        if isinstance(value, dict):
            _check_sizes(folder, value)
        most = next((most for words, most in MOST.items() if re.search(words, name)), None)
        if most is not None and isinstance(value, int | float) and abs(value) > most:
            got = f"{name} {value:.3g} in {folder / 'config.json'}"
            raise UserError("The model is larger than any", got=got, expected=f"at most {most:,}", do="correct it")


def _lacks(folder: Path, lacks: str, expected: str, do: str) -> UserError:
    names = sorted(p.name for p in folder.iterdir())
    listing = ", ".join(names[:8]) + (" ..." if len(names) > 8 else "") or "no files"
    return UserError(f"The model folder holds no {lacks}", got=f"{folder} with {listing}", expected=expected, do=do)


def from_hub(what: str, name: str, load: Any) -> Any:
    """Call a loader of a model, tokenizer, data set; whatever it raises about the hub becomes a one-line error."""
    reachable = is_local(name) or hub_answers()
    try:
        return load()
    except UserError:
        raise
    except Exception as error:
        # What a loader raises has no common base: safetensors, huggingface_hub, datasets and torch have their own.
        if is_local(name):
            text = f"KeyError: {error}" if isinstance(error, KeyError) else str(error)
            reason = (text.strip().splitlines() or [type(error).__name__])[0].strip()
            raise UserError(f"The {what} could not be loaded", got=f"{name}: {reason}") from error
        if not isinstance(error, (OSError, ValueError)):
            raise
        why = "is not on the Hugging Face hub, or can't be loaded from there"
        if not reachable:
            why = "is not on this machine, and the Hugging Face hub does not answer or is off (HF_HUB_OFFLINE)"
        raise UserError(
            f"The {'model' if what == 'tokenizer' else what} '{name}' {why}; check the name and the connection, "
            "or download it elsewhere and give the path"
        ) from error


@cache
def hub_answers() -> bool:
    """Whether the Hugging Face hub can be reached; asked once, and not to be asked again if it can't.

    Its libraries try every file for half a minute before they give up. Switched off, they look into their cache
    at once.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:  # proxies and http libraries have errors of their own
        os.environ["HF_HUB_OFFLINE"] = "1"  # for libraries and processes yet to come
        constants.HF_HUB_OFFLINE = True
        return False
    return True


def load_config(name: str, **source: Any) -> Any:
    """A model's configuration, without its weights, from a source of ``revision`` and ``trust_remote_code``.

    Attention by a kernel of the hub is code, and refused where that is not trusted.
    """
    from transformers import AutoConfig

    path = resolve_model(name)
    config = from_hub("model", name, lambda: AutoConfig.from_pretrained(path, **source))
    kernel = str(config._attn_implementation)
    if "/" in kernel and not source.get("trust_remote_code"):
        do = "name another attn_implementation in config.json, such as sdpa, or trust it (model.trust_remote_code)"
        raise UserError("The model's attention is code of the hub", got=f"{name}: {kernel}", do=do)
    return config


def meta_model(config: Any, *, trust_remote_code: bool, **settings: Any) -> Any:
    """A causal language model on the meta device, which has shapes and neither memory nor numbers."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):  # and without trust_remote_code transformers would ask on stdin
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, **settings)
