"""A run's settings and the weights that it hands on, for commands whose first word is a run folder."""

from pathlib import Path
from typing import Any

from rlif_lightning.cli.recipe_objects import RecipeObjects
from rlif_lightning.cli.recipes import recipes_first
from rlif_lightning.runs import folder as runs


def run_settings(words: list[str]) -> list[str]:
    """Replace a run folder, as the first word of a command line, by the settings that it holds."""
    if not words or words[0].startswith("-"):
        return words
    run = Path(words[0]).expanduser()
    runs.check_run_folder(run, runs.CONFIG)
    if not (run / runs.CHECKPOINTS).is_dir():
        runs.find_checkpoint(str(run), run.parent.parent, run.parent.name)  # raises
    # The settings of a continued run name the checkpoint that it began with.
    return ["--config", str(run / runs.CONFIG), "--ckpt_path=null", *words[1:]]


def choose_checkpoint(asked: str | None, run: Path | None, root: Path, recipe: str) -> Path:
    """The file that holds a run's weights: as asked, else what the guard hands back, else the last checkpoint.

    Without a run's folder the newest run of the recipe is meant.
    """
    if asked not in (None, "last"):
        run = Path(str(asked)).expanduser()
        if not (run / runs.CHECKPOINTS).is_dir():
            return runs.find_checkpoint(str(asked), root, recipe)
        asked = None
    run = run or runs.latest_run_folder(root, recipe)
    if asked is None and run is not None and (run / runs.GUARD_WEIGHTS).is_file():
        return run / runs.GUARD_WEIGHTS
    return runs.find_checkpoint("last" if run is None else str(run), root, recipe)


class RunObjects(RecipeObjects):
    """The settings of a run, and in ``ckpt_path`` its weights."""

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Find the weights before anything is loaded; the settings of their run take the place of the recipe's.

        The run may have been started with more settings than the recipe's; those on the command line still win.
        """
        super().parse_arguments(parser, args)
        last = Path(str(self.config.config[-1])) if self.config.config else Path()
        own = last.parent if last.name == runs.CONFIG and (last.parent / runs.CHECKPOINTS).is_dir() else None
        root, recipe = Path(self.config.runs).expanduser(), runs.recipe_name(self.config.config)
        checkpoint = choose_checkpoint(self.config.ckpt_path, own, root, recipe)
        run = runs.run_folder_of(checkpoint)
        if own is None and run is not None and (run / runs.CONFIG).is_file():
            super().parse_arguments(parser, ["--config", str(run / runs.CONFIG), *recipes_first(args)[1]])
        self.config.ckpt_path = str(checkpoint)

    def before_instantiate_classes(self) -> None:
        """Nothing: the checkpoint has been found, and no run folder is made."""
