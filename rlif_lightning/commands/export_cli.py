"""The settings of a run that is exported."""

from pathlib import Path
from typing import Any

import torch

from rlif_lightning.cli.recipe_objects import PlainCLI
from rlif_lightning.cli.trainer import recipe_name
from rlif_lightning.main import run_root
from rlif_lightning.models.precision import precision_name
from rlif_lightning.runs.folder import (
    CHECKPOINTS,
    CONFIG,
    GUARD_WEIGHTS,
    find_checkpoint,
    latest_run_folder,
    run_folder_of,
)


class ExportCLI(PlainCLI):
    """Finds the run's weights; takes nothing from the trainer's settings but the precision, as it runs on the CPU."""

    asked: str | None = None
    """The value of ``--ckpt_path``."""

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Find the weights before anything is loaded; a run's own settings take the place of the recipe's.

        The run may have been started with more than the recipe; what stands on the command line now still wins.
        """
        super().parse_arguments(parser, args)
        self.asked = self.config.ckpt_path
        root, recipe = run_root(self.config.runs), recipe_name(self.config.config)
        last = Path(str(self.config.config[-1])) if self.config.config else Path()
        own = last.parent if last.name == CONFIG and (last.parent / CHECKPOINTS).is_dir() else None
        checkpoint = choose_checkpoint(self.asked, own, root, recipe)
        run = run_folder_of(checkpoint)
        if own is None and run is not None and (run / CONFIG).is_file():
            super().parse_arguments(parser, ["--config", str(run / CONFIG), *_without_recipes(args)])
        self.config.ckpt_path = str(checkpoint)

    def before_instantiate_classes(self) -> None:
        """Name the folder of all runs."""
        self.root, self.recipe = run_root(self.config.runs), recipe_name(self.config.config)

    def instantiate_trainer(self, **kwargs: Any) -> None:  # type: ignore[override]
        """Any machine can export: the run's GPU is not looked for."""
        self.device, self.precision = torch.device("cpu"), precision_name(self.config_init.trainer.precision)


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
        path = Path(str(asked)).expanduser()
        if not (path / CHECKPOINTS).is_dir():
            return find_checkpoint(str(asked), root, recipe)
        asked, run = None, path
    if run is None:
        run = latest_run_folder(root, recipe)
        if run is None:
            find_checkpoint("last", root, recipe)  # says what there is
    assert run is not None
    kept = run / GUARD_WEIGHTS
    if asked is None and kept.is_file():
        return kept
    return find_checkpoint(str(run), root, recipe)


def _without_recipes(words: list[str]) -> list[str]:
    """The words of a command line but for ``--config`` and what follows it."""
    flags = ("--config", "-c")
    return [
        word
        for before, word in zip(["", *words], words, strict=False)
        if word not in flags and before not in flags and not word.startswith("--config=")
    ]
