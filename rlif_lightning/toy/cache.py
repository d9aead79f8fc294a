"""Names of the toy model and its place in the user's cache."""

import json
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import cast, get_args

from filelock import AcquireReturnProxy, FileLock
from safetensors import SafetensorError, safe_open

from rlif_lightning.errors import UserError, did_you_mean, writing
from rlif_lightning.toy import pretraining
from rlif_lightning.toy.recipe import PHASES, Variant, recipe_hash

# The base that `toy` means: of the first five, one with a clear rise and fall under self-certainty and a flat
# random control. docs/toy.md has all five.
DEFAULT_SEED = 1

_EXPECTED = f"{', '.join(get_args(Variant))}, or one of them with a seed: toy:3"


def cache_dir() -> Path:
    """Where built toys stay: ``$RLIF_CACHE``, else ``rlif_lightning`` in ``$XDG_CACHE_HOME`` or in ``~/.cache``."""
    if own := os.environ.get("RLIF_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rlif_lightning"


def parse_toy_name(name: str) -> tuple[Variant, int] | None:
    """Variant and seed (1 where the name has none) of a toy, or None if a name is that of a folder or of the hub."""
    variant, colon, seed = name.partition(":")
    if variant not in get_args(Variant):
        return None
    if colon and not re.fullmatch(r"[0-9]{1,9}", seed):
        raise UserError("The seed of the toy model is not a number.", got=name, expected=_EXPECTED)
    return cast(Variant, variant), int(seed or DEFAULT_SEED)


def refuse_almost_toy(name: str) -> None:
    """Answer a slip in a toy's name, without the user and / of a hub name, before it is looked for on the hub."""
    near = did_you_mean(name.partition(":")[0], get_args(Variant), repr, 0.8)
    if near and "/" not in name:
        raise UserError(f"Nothing is called '{name}'; {near}", expected=_EXPECTED)


def toy_model(name: str = "toy", progress: bool = True) -> Path:
    """The folder of a toy (``toy``, ``toy-tuned:3``) that Auto classes of transformers load; built if there is none.

    A folder appears complete or not at all, and one that was damaged since is built again. Processes that ask at the
    same time wait for the first. ``progress``: show a bar while building.
    """
    parsed = parse_toy_name(name)
    if parsed is None:
        raise UserError("Unknown toy model.", got=name, expected=_EXPECTED)
    variant, seed = parsed
    folder = cache_dir() / f"{variant}-seed{seed}-{recipe_hash(variant)}"
    if _is_whole(folder):
        return folder
    base = toy_model(f"toy:{seed}", progress) if variant == "toy-tuned" else None
    phases = PHASES[variant][len(PHASES["toy"]) if base else 0 :]
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    with _lock(folder.with_name(f".{folder.name}.lock")):
        try:
            if not _is_whole(folder):  # nobody built it while we waited
                if folder.exists():
                    warnings.warn(f"{folder} is damaged: {name} is built again.", stacklevel=2)
                for left in (unfinished, folder):  # the former of a build that was killed
                    shutil.rmtree(left, ignore_errors=True)
                with writing(folder):
                    unfinished.mkdir()
                    pretraining.build_toy(unfinished, phases, seed, base=base, progress=progress)
                    unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _is_whole(folder: Path) -> bool:
    """Whether the files of a toy are there in their full length, which a power cut may have cost them."""
    try:
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            json.loads((folder / name).read_text(encoding="utf-8"))
        with safe_open(folder / "model.safetensors", framework="pt"):
            return True
    except (OSError, ValueError, SafetensorError):
        return False


def _lock(path: Path) -> AcquireReturnProxy:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(path).acquire()
    except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
        raise UserError(
            "The cache folder for the toy model cannot be used.",
            got=f"{path.parent} ({error})",
            do="set RLIF_CACHE to a folder that can be written",
        ) from error
