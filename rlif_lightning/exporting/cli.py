"""The settings of a run that is exported."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from rlif_lightning.cli import run_root
from rlif_lightning.commands.export import choose_checkpoint
from rlif_lightning.commands.objects import PlainCLI
from rlif_lightning.run_folder import CHECKPOINTS, CONFIG
from rlif_lightning.trainer_cli import recipe_name


class ExportCLI(PlainCLI):
    """Finds the run's weights; takes nothing from the trainer's settings but the precision, as it runs on the CPU."""

    precision = "32-true"
    """In which the run was trained."""
    asked: str | None = None
    """The value of ``--ckpt_path``."""

    def before_instantiate_classes(self) -> None:
        """Find the weights before anything is loaded."""
        config = self.config
        self.root, self.recipe = run_root(config.runs), recipe_name(config.config)
        last = Path(str(config.config[-1])) if config.config else Path()
        run = last.parent if last.name == CONFIG and (last.parent / CHECKPOINTS).is_dir() else None
        self.asked = config.ckpt_path
        config.ckpt_path = str(choose_checkpoint(self.asked, run, self.root, self.recipe))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A Trainer that any machine can make."""
        settings = self.config_init.trainer
        self.precision = str(settings.precision or self.precision)
        settings.accelerator, settings.precision, settings.plugins = "cpu", "32-true", None
        return super().instantiate_trainer(**kwargs)
