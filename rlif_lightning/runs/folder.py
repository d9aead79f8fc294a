"""Run folders: ``<root>/<recipe>/<n>`` is one run and holds everything that run has written.

A run folder holds config.yaml, checkpoints/, TensorBoard events, metrics.csv, completions.jsonl and guard.json.
A resumed run continues in the folder of its checkpoint.
"""

import os
from pathlib import Path

from rlif_lightning.errors import UserError
from rlif_lightning.runs.atomic import replacing as replacing  # where it was before

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
LAST_CHECKPOINT = "last.ckpt"
METRICS = "metrics.csv"
COMPLETIONS = "completions.jsonl"
GUARD = "guard.json"
GUARD_WEIGHTS = f"{CHECKPOINTS}/guard/weights.safetensors"


def next_run_folder(root: Path, recipe: str) -> Path:
    """Create and return ``<root>/<recipe>/<n>``, n one above the highest there (1 in an empty root).

    Two processes that ask at the same moment get different folders.

    Raises:
        UserError: The folder cannot be created.
    """
    parent = Path(root) / recipe
    try:
        parent.mkdir(parents=True, exist_ok=True)
        while True:
            folder = parent / str(max(_numbers(parent), default=0) + 1)
            try:
                folder.mkdir()
            except FileExistsError:  # another process was faster
                continue
            return folder
    except OSError as error:
        raise UserError(
            "The run folder cannot be created.",
            got=f"{parent}: {error.strerror or error}",
            expected="a folder that can be written to",
            do="choose another root for the runs, or change the permissions of this one",
        ) from error


def latest_run_folder(root: Path, recipe: str) -> Path | None:
    """Return the newest run of the recipe (by number) that holds a checkpoint, None if there is none."""
    return next((run for run in reversed(_runs(Path(root) / recipe)) if _checkpoints(run)), None)


def check_run_folder(folder: Path, file: str) -> None:
    """Refuse a folder that lacks a file which every run has.

    Raises:
        UserError: It lacks the file, or does not exist; the message names run folders below it.
    """
    if (folder / file).is_file():
        return
    below = sorted(str(p.parent) for depth in ("*", "*/*") for p in folder.glob(f"{depth}/{file}"))
    raise UserError(
        f"This is not a run folder: it has no {file}." if folder.is_dir() else "The run folder does not exist.",
        got=folder,
        expected="a run folder such as runs/quickstart/1",
        do=f"name one of {', '.join(below[:8])}" if below else "correct the path; `rlif fit` makes runs",
    )


def find_checkpoint(ckpt_path: str, root: Path, recipe: str) -> Path:
    """Turn the value of ``--ckpt_path`` into the checkpoint that it means.

    Args:
        ckpt_path: "last" (the newest run of this recipe that holds a checkpoint), the path of a
            checkpoint, or a run folder (its last checkpoint).
        root: The folder of all runs.
        recipe: The recipe's name.

    Raises:
        UserError: There is no such checkpoint. A run never starts from scratch instead.
    """
    if ckpt_path == "last":
        run = latest_run_folder(root, recipe)
        if run is None:
            raise UserError(
                f"There is no checkpoint to continue recipe {recipe!r} from.",
                got=f"--ckpt_path last; looked for {Path(root) / recipe}/*/{CHECKPOINTS}/*.ckpt",
                expected=_known_runs(Path(root)),
                do="leave out --ckpt_path to start a new run, or give the path of a checkpoint",
            )
        return _last_checkpoint(run)
    path = Path(ckpt_path).expanduser()
    if (path / CHECKPOINTS).is_dir():
        return _last_checkpoint(path)
    if (path / CONFIG).exists():
        raise UserError(
            "The run folder holds no checkpoint.",
            got=f"--ckpt_path {ckpt_path}",
            expected=_known_runs(Path(root)),
            do="give a run of `rlif fit`: runs of test, validate and predict hold only results",
        )
    if not path.exists():
        raise UserError(
            "The checkpoint does not exist.",
            got=f"--ckpt_path {ckpt_path}; looked for {path.absolute()}",
            expected=f"last, or a path; {_known_runs(Path(root))}",
            do="correct the path, or leave out --ckpt_path to start a new run",
        )
    return path


def run_folder_of(checkpoint: Path) -> Path | None:
    """Return the run folder (absolute) whose ``checkpoints/`` holds the file, None outside of one."""
    path = Path(os.path.abspath(checkpoint))  # not resolve(): last.ckpt may be a link
    holder = next((parent for parent in path.parents if parent.name == CHECKPOINTS), None)
    if holder is None or not any((holder.parent / name).exists() for name in (CONFIG, METRICS)):
        return None
    return holder.parent


def _numbers(parent: Path) -> list[int]:
    """Return the names in a folder that are numbers, as numbers."""
    names = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
    return [int(name) for name in names if name.isascii() and name.isdigit()]


def _runs(parent: Path) -> list[Path]:
    """Return the run folders of one recipe, oldest first."""
    return [parent / str(n) for n in sorted(_numbers(parent)) if (parent / str(n)).is_dir()]


def _checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run by name (files, or folders where they are sharded)."""
    return sorted(path for path in (run / CHECKPOINTS).glob("*.ckpt") if path.exists())


def _last_checkpoint(run: Path) -> Path:
    last = run / CHECKPOINTS / LAST_CHECKPOINT
    if not last.exists():
        names = ", ".join(path.name for path in _checkpoints(run))
        raise UserError(
            "The run has no last checkpoint.",
            got=f"looked for {last}",
            expected=f"checkpoints of this run: {names or 'none'}",
            do="give the path of one of its checkpoints, or leave out --ckpt_path to start a new run",
        )
    return last


def _known_runs(root: Path) -> str:
    """Say which runs below the root hold checkpoints."""
    recipes = sorted(entry for entry in root.iterdir() if entry.is_dir()) if root.is_dir() else []
    runs = [str(run) for recipe in recipes for run in _runs(recipe) if _checkpoints(run)]
    if not runs:
        return f"no run below {root} holds a checkpoint"
    more = f" and {len(runs) - 8} more" if len(runs) > 8 else ""
    return f"runs with checkpoints: {', '.join(runs[-8:])}{more}"
