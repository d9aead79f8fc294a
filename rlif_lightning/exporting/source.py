"""Which weights of which run are exported."""

from pathlib import Path

from rlif_lightning.runs.folder import (
    CHECKPOINTS,
    CONFIG,
    GUARD_WEIGHTS,
    check_run_folder,
    find_checkpoint,
    latest_run_folder,
)


def run_settings(words: list[str]) -> list[str]:
    """Replace a run folder, as the first word of a command line, by the settings that it holds.

    Raises:
        UserError: It is no run folder, or the folder of a run without checkpoints.
    """
    if not words or words[0].startswith("-"):
        return words
    run = Path(words[0]).expanduser()
    check_run_folder(run, CONFIG)
    if not (run / CHECKPOINTS).is_dir():
        find_checkpoint(str(run), run.parent.parent, run.parent.name)  # raises
    # The settings of a continued run name the checkpoint that it began with.
    return ["--config", str(run / CONFIG), "--ckpt_path=null", *words[1:]]


def choose_checkpoint(asked: str | None, run: Path | None, root: Path, recipe: str) -> Path:
    """The file that holds the weights to export.

    Args:
        asked: ``last``, a path, or None: what the collapse guard hands back, else the last checkpoint.
        run: A run's folder; None: the newest run of the recipe.
        root: The folder of all runs.
        recipe: The recipe's name.

    Raises:
        UserError: There are no such weights.
    """
    if asked not in (None, "last"):
        run = Path(str(asked)).expanduser()
        if not (run / CHECKPOINTS).is_dir():
            return find_checkpoint(str(asked), root, recipe)
        asked = None
    run = run or latest_run_folder(root, recipe)
    if asked is None and run is not None and (run / GUARD_WEIGHTS).is_file():
        return run / GUARD_WEIGHTS
    return find_checkpoint("last" if run is None else str(run), root, recipe)
