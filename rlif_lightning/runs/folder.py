"""Run folders: ``<root>/<recipe>/<n>`` is one run of a fit and holds everything that run has written.

Those of other commands are ``<root>/<recipe>/<command>/<n>``. A fit's holds config.yaml, checkpoints/, TensorBoard
events, metrics.csv, completions.jsonl, guard.json, held_out.jsonl (answers to a few held-out problems at each
evaluation) and skipped.jsonl (completions of skipped steps). A run that is continued stays in the folder of its
checkpoint.
"""

import os
import shutil
from pathlib import Path
from typing import IO, Any

from rlif_lightning.errors import UserError, writing
from rlif_lightning.runs.atomic import replacing

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

CONFIG = "config.yaml"
LOCK = ".lock"
CHECKPOINTS = "checkpoints"
LAST_CHECKPOINT = "last.ckpt"
METRICS = "metrics.csv"
COMPLETIONS = "completions.jsonl"
HELD_OUT = "held_out.jsonl"
SKIPPED = "skipped.jsonl"
ROWS = (COMPLETIONS, HELD_OUT, SKIPPED)  # JSON lines with a step, to which a continued run cuts them back
GUARD = "guard.json"
GUARD_WEIGHTS = f"{CHECKPOINTS}/guard/weights.safetensors"


def recipe_name(configs: list[Any] | None) -> str:
    """The names of the given recipes, joined: runs of a recipe with other overlays stand apart."""
    names = [Path(str(c)).stem for c in configs or [] if c is not None]
    return "+".join(names) or "run"


def writable_folder(path: str | Path, setting: str = "--runs") -> Path:
    """A folder that exists or can be made, with ``~`` replaced; it must allow writing."""
    folder = Path(path).expanduser()
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError("The output folder can't be written to", got=folder, do=f"give another one with {setting}")
    return folder


def lock_run(folder: Path) -> IO[bytes]:
    """Keep other processes from writing into a run folder until the returned file is closed or this process ends.

    Does nothing on Windows, and on file systems without locks.
    """
    try:
        with writing(folder):
            file = (folder / LOCK).open("wb")
    except OSError as error:
        got = f"{folder}: {error.strerror}"
        raise UserError("The run folder can't be written to", got=got, do="continue a copy of it") from error
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        do = "wait for its end, or end it; a new run (without --ckpt_path) gets a folder of its own"
        raise UserError("Another process writes to this run", got=folder, do=do) from error
    except OSError:  # no locks here
        pass
    guard = (folder / GUARD_WEIGHTS).parent
    for left in [*folder.rglob(".*.new"), *guard.glob(".tmp*")]:  # of a killed process, ours and safetensors'
        left.unlink(missing_ok=True)
    return file


def discard_run_folder(root: Path, folder: Path, stopped: bool = False) -> None:
    """Remove the folder of a run that failed before it wrote anything, so that it takes no number.

    Folders above that are left empty go as well, up to the root of all runs. Anything but settings, empty event files
    and the checkpoint of the start keeps it; that of a run that was stopped (not one that failed) is kept.
    """
    files = [f for f in folder.rglob("*") if f.is_file()]
    nothing = (CONFIG, LOCK) if stopped else (CONFIG, LOCK, LAST_CHECKPOINT)
    if any(f.name not in nothing and "tfevents" not in f.name for f in files):
        return
    shutil.rmtree(folder, ignore_errors=True)
    while folder != root:
        folder = folder.parent
        try:
            folder.rmdir()
        except OSError:
            return


def next_run_folder(root: Path, recipe: str, trains: bool = False) -> Path:
    """Create ``<root>/<recipe>/<n>``, n one above the highest there; two processes at once get different folders.

    Where the run trains, with an empty ``checkpoints/``: the mark of a run that has begun.
    """
    parent = Path(root) / recipe
    try:
        with writing(parent):
            parent.mkdir(parents=True, exist_ok=True)
            while True:
                folder = parent / str(max(_numbers(parent), default=0) + 1)
                try:
                    folder.mkdir()
                except FileExistsError:  # another process was faster
                    continue
                if trains:
                    (folder / CHECKPOINTS).mkdir()
                return folder
    except OSError as error:
        got = f"{parent}: {error.strerror or error}"
        do = "choose another root for the runs, or change the permissions of this one"
        raise UserError("The run folder cannot be created.", got=got, do=do) from error


def latest_run_folder(root: Path, recipe: str) -> Path | None:
    """The newest run of the recipe (by number) that holds a checkpoint, None if there is none."""
    return next(reversed(_runs_with_checkpoint(Path(root) / recipe)), None)


def keep_settings(run: Path, step: int) -> str:
    """Before config.yaml is replaced, keep the settings of the steps before ``step``; returns their text.

    Where a run goes back, ``config.until-step-<n>.yaml`` of the first n from ``step`` on has them, and later ones are
    given up with their steps.
    """
    kept = {int(path.stem.rpartition("-")[2]): path for path in run.glob("config.until-step-*.yaml")}
    source = next((kept[n] for n in sorted(kept) if n >= step), run / CONFIG)
    settings = source.read_bytes() if source.is_file() else b""
    with replacing(run / f"config.until-step-{step}.yaml") as file:
        file.write(settings)
    for n in kept:
        if n > step:
            kept[n].unlink()
    return settings.decode(errors="replace")


def numbered_checkpoints(folder: Path) -> dict[int, Path]:
    """Step to file of the ``step=<n>.ckpt`` in a folder."""
    return {int(path.stem[5:]): path for path in folder.glob("step=*.ckpt") if path.stem[5:].isdecimal()}


def check_run_folder(folder: Path, file: str) -> None:
    """Refuse a folder that lacks a file which every run has, and name run folders below it."""
    if (folder / file).is_file():
        return
    found = (sorted(str(path.parent) for path in folder.glob(f"{depth}/{file}")) for depth in ("*", "*/*"))
    below = next(filter(None, found), [])
    raise UserError(
        f"This is not a run folder: it has no {file}." if folder.is_dir() else "The run folder does not exist.",
        got=folder,
        expected="a run folder such as runs/quickstart/1",
        do=f"name one of {', '.join(below[:8])}" if below else "correct the path; `rlif fit` makes runs",
    )


def can_continue(root: Path, recipe: str) -> bool:
    """Whether the newest training run of the recipe holds a checkpoint."""
    newest = _newest(Path(root) / recipe)
    return newest is not None and newest == latest_run_folder(root, recipe)


def find_checkpoint(ckpt_path: str, root: Path, recipe: str) -> Path:
    """The checkpoint that a value of ``--ckpt_path`` means; a run never starts from scratch instead.

    It is "last" or "auto" (of the recipe's newest run below ``root``), the path of a checkpoint, or a run folder.
    """
    path: Path | None = Path(ckpt_path).expanduser()
    if ckpt_path in ("last", "auto"):
        path, begun = latest_run_folder(root, recipe), _newest(Path(root) / recipe)
        if path != begun is not None and path is not None:
            raise UserError(
                "The newest run has no checkpoint, and an older one is never continued in its place",
                got=f"--ckpt_path {ckpt_path}; the newest run is {begun}, the newest with a checkpoint {path}",
                do=f"leave out --ckpt_path (or give auto) to begin anew, or give --ckpt_path {path}",
            )
    if path is None:
        wrong = f"There is no checkpoint to continue recipe {recipe!r} from."
        got = f"; looked for {Path(root) / recipe}/*/{CHECKPOINTS}/*.ckpt"
        do = "leave out --ckpt_path to start a new run, or give the path of a checkpoint"
    elif (path / CHECKPOINTS).is_dir():
        if (path / CHECKPOINTS / LAST_CHECKPOINT).exists():
            return path / CHECKPOINTS / LAST_CHECKPOINT
        others = ", ".join(sorted(p.name for p in (path / CHECKPOINTS).glob("*.ckpt")))
        wrong, got = "The run has no last checkpoint.", f"; {path / CHECKPOINTS} holds {others or 'no checkpoint'}"
        do = "give the path of one of its checkpoints, or leave out --ckpt_path to start a new run"
    elif (path / CONFIG).exists():
        wrong, got = "The run folder holds no checkpoint.", ""
        do = "give a run of `rlif fit`: runs of test, validate and predict hold only results"
    elif path.is_dir():
        wrong, got = "The folder is no run: it has no checkpoints.", ""
        do = "give a run's folder or the path of a checkpoint; a model's folder is given in --model.name"
    elif path.exists():
        return path
    else:
        wrong, got = "The checkpoint does not exist.", f"; looked for {path.absolute()}"
        do = "correct the path, or leave out --ckpt_path to start a new run"
    raise UserError(wrong, got=f"--ckpt_path {ckpt_path}{got}", expected=_known_runs(Path(root)), do=do)


def run_folder_of(checkpoint: Path) -> Path | None:
    """The run folder (absolute) whose ``checkpoints/`` holds the file, None outside of one."""
    path = Path(os.path.abspath(checkpoint))  # not resolve(): last.ckpt may be a link
    run = next((parent.parent for parent in path.parents if parent.name == CHECKPOINTS), None)
    return run if run is not None and any((run / name).exists() for name in (CONFIG, METRICS)) else None


def _numbers(parent: Path) -> list[int]:
    """The names in a folder that are numbers, in their order."""
    names = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


def _newest(parent: Path) -> Path | None:
    """The newest training run of a recipe, with or without a checkpoint."""
    runs = (parent / str(n) for n in reversed(_numbers(parent)))
    return next((run for run in runs if (run / CHECKPOINTS).is_dir()), None)


def _runs_with_checkpoint(parent: Path) -> list[Path]:
    """The run folders of a recipe that hold a checkpoint (a file, or a folder where it is sharded), oldest first."""
    runs = [parent / str(n) for n in _numbers(parent)]
    return [run for run in runs if any(path.exists() for path in (run / CHECKPOINTS).glob("*.ckpt"))]


def _known_runs(root: Path) -> str:
    """Say which runs below the root hold checkpoints, or in it where it is a recipe's."""
    recipes = [root, *sorted(root.iterdir())] if root.is_dir() else []
    runs = [str(run) for recipe in recipes for run in _runs_with_checkpoint(recipe)]
    if not runs:
        return f"no run below {root} holds a checkpoint"
    more = f" and {len(runs) - 8} more" if len(runs) > 8 else ""
    return f"runs with checkpoints: {', '.join(runs[-8:])}{more}"
