"""Names of models: a local folder, the embedded toy, or a name on the Hugging Face hub."""

import json
from pathlib import Path
from typing import Any

from rlif_lightning.errors import UserError


def is_local(name: str) -> bool:
    """Whether a name is meant as a path rather than as a hub name."""
    return Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1


def resolve_model(name: str) -> str:
    """Turn a model name into something transformers loads, checking what can be checked beforehand.

    Args:
        name: ``toy`` (built on first use), a folder, or a hub name such as ``Qwen/Qwen2.5-1.5B``.

    Raises:
        UserError: The folder is missing, or holds no config.json or no safetensors weights.
    """
    from rlif_lightning.toy import parse_toy_name, toy_model

    if parse_toy_name(name) is not None:
        return str(toy_model(name))
    if not is_local(name):
        return name
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise UserError("The model folder does not exist", got=folder, do="check --model.name")
    if not (folder / "config.json").is_file():
        raise UserError(
            "The model folder holds no config.json",
            got=f"{folder} with {_listing(folder)}",
            expected="a folder written by save_pretrained()",
        )
    if not any(folder.glob("*.safetensors")):
        pickled = any(folder.glob("*.bin"))
        raise UserError(
            "The model folder holds no weights in safetensors format",
            got=f"{folder} with {_listing(folder)}",
            expected="model.safetensors, or model-*.safetensors with an index",
            do="convert the .bin files with save_pretrained(); pickled weights can run code and are not loaded"
            if pickled
            else "copy the weights into the folder",
        )
    return str(folder)


def _listing(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir())
    return ", ".join(names[:8]) + (" ..." if len(names) > 8 else "") or "no files"


def from_hub(what: str, name: str, load: Any) -> Any:
    """Call a loader; a hub that cannot be reached or lacks the name becomes a one-line error.

    Args:
        what: "model", "tokenizer" or "data set", for the message.
        name: As the user wrote it.
        load: Called without arguments.
    """
    try:
        return load()
    except (OSError, ConnectionError, ValueError) as error:
        if is_local(name) and Path(name).exists():
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(f"The {what} could not be loaded", got=name, expected=first) from error
        raise UserError(
            f"The {what} '{name}' is neither a local path nor reachable on the Hugging Face hub; "
            "check the name and the connection, or download it elsewhere and give the path of the folder or file"
        ) from error


def read_model_config(path: str) -> dict[str, Any]:
    """The config.json of a local model folder; empty where it is not local."""
    file = Path(path) / "config.json"
    return json.loads(file.read_text()) if file.is_file() else {}
