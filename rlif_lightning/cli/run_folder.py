"""Where the runs of a command line go: ``<runs>/<recipes joined by +>/<n>``."""

import os
import shutil
from pathlib import Path
from typing import Any

from rlif_lightning.errors import UserError


def recipe_name(configs: list[Any] | None) -> str:
    """The names of the given recipes, joined: runs of a recipe with other overlays stand apart."""
    names = [Path(str(c)).stem for c in configs or [] if c is not None]
    return "+".join(names) or "run"


def run_root(path: str) -> Path:
    """The folder that holds all runs.

    Raises:
        UserError: It can't be written to.
    """
    root = Path(path).expanduser()
    existing = next(p for p in (root, *root.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError("The output folder can't be written to", got=root, do="give another one with --runs")
    return root


def discard_run_folder(folder: Path) -> None:
    """Remove the folder of a run that failed before it wrote anything, so that it takes no number.

    Folders above that are left empty go as well. Anything but settings and empty event files keeps it.
    """
    if not folder.is_dir():
        return
    files = [f for f in folder.rglob("*") if f.is_file()]
    if any(f.name not in ("config.yaml", "hparams.yaml") and "tfevents" not in f.name for f in files):
        return
    shutil.rmtree(folder, ignore_errors=True)
    for above in list(folder.parents)[:2]:  # of the recipe, of all runs
        try:
            above.rmdir()
        except OSError:
            return
