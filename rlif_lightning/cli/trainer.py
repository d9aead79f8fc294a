"""LightningCLI for RLIF: it turns settings into objects and gives every run a folder."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from rlif_lightning.callbacks import (
    CollapseGuard,
    Completions,
    Evaluation,
    MemoryCheck,
    Report,
    RolloutCallback,
    RolloutCheckpoint,
    StepProgressBar,
)
from rlif_lightning.callbacks.memory_check import out_of_memory
from rlif_lightning.cli.command_table import COMMANDS
from rlif_lightning.cli.environment import prepare
from rlif_lightning.cli.parser import Parser
from rlif_lightning.data.module import PromptDataModule
from rlif_lightning.errors import UserError, check_finite
from rlif_lightning.models.checkpoints import KEPT, read_checkpoint
from rlif_lightning.models.strategies import check_strategy
from rlif_lightning.runs import folder as runs
from rlif_lightning.runs.logger import RunLogger
from rlif_lightning.training.module import RLIFModule
from rlif_lightning.warnings_shown import short_warnings

RUN_FOLDER = "RLIF_RUN_FOLDER"  # tells the processes that Lightning starts which folder their run has
TRAINER_DEFAULTS = {"log_every_n_steps": 1, "num_sanity_val_steps": 0}
TRAINER_DEFAULTS |= {"enable_model_summary": False, "use_distributed_sampler": False}


class RLIFCLI(LightningCLI):
    """``rlif fit | validate | test | predict``."""

    created: ClassVar[Path | None] = None
    """The run folder that this process has made; an early failure removes it."""

    @classmethod
    def run(cls, arguments: list[str]) -> "RLIFCLI":
        """Parse and run one command: its name and the words after it."""
        prepare()
        try:
            return cls(RLIFModule, PromptDataModule, **cls.settings(arguments))
        except torch.OutOfMemoryError as error:
            raise out_of_memory(error) from error
        except BaseException:
            if cls.created is not None:
                runs.discard_run_folder(cls.created)
            raise
        finally:
            cls.created = None
            os.environ.pop(RUN_FOLDER, None)

    @staticmethod
    def settings(arguments: list[str]) -> dict[str, Any]:
        """The arguments of Lightning's command line."""
        return {
            "args": arguments,
            "parser_class": Parser,
            "parser_kwargs": {"prog": "rlif"},
            "save_config_callback": SaveConfig,
            "save_config_kwargs": {"overwrite": True},
            "seed_everything_default": 0,
            "trainer_defaults": TRAINER_DEFAULTS,
            "auto_configure_optimizers": False,
            "load_from_checkpoint_support": False,
        }

    def add_arguments_to_parser(self, parser: Any) -> None:
        """Give every callback a key of its own: lists of callbacks would merge by position."""
        parser.add_lightning_class_args(MemoryCheck, "memory_check")  # first: before the evaluation takes its time
        parser.add_lightning_class_args(RolloutCallback, "rollout")
        parser.add_lightning_class_args(Evaluation, "evaluation")
        parser.add_lightning_class_args(CollapseGuard, "guard")
        parser.add_lightning_class_args(Completions, "completions")
        parser.add_lightning_class_args(RolloutCheckpoint, "checkpoint")
        parser.add_argument("--runs", default="runs", help="Folder of all runs; a run gets <runs>/<recipe>/<n>.")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """As in the base class, without arguments that would do nothing here."""
        unused = {"weights_only", "return_predictions", "verbose", "dataloaders"}
        return {name: skip | unused for name, skip in LightningCLI.subcommands().items()}

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> Any:
        """As in the base class, with our own description: the Trainer's is about the Trainer, and cut short."""
        kwargs["description"] = f"{COMMANDS[subcommand].purpose.capitalize()}."
        return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parse; the base class warns when arguments are given, which is how ``main`` always calls it."""
        short_warnings()
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Nothing: a value on the command line wins over one stored in a checkpoint."""

    def before_instantiate_classes(self) -> None:
        """Check numbers and strategy, and find the checkpoint, before anything is loaded."""
        config = self.config if self.subcommand is None else self.config[self.subcommand]
        check_finite(config)
        strategy = config.trainer.strategy
        check_strategy(strategy if isinstance(strategy, str) else strategy.class_path)
        self.root = runs.run_root(config.runs)
        self.recipe = runs.recipe_name(config.config)
        if config.ckpt_path is not None:
            config.ckpt_path = str(self._find_checkpoint(config.ckpt_path))
            if self.subcommand == "fit" and config.ckpt_path.endswith(KEPT):
                wrong = "Training can't continue from weights alone: the optimiser's state is missing"
                do = "use them with test, validate, predict, diagnose or mix, or train with --guard.action restore"
                raise UserError(wrong, got=config.ckpt_path, do=do)
            # Read here: a file that is no checkpoint is refused before anything is loaded.
            self.checkpoint_step = read_checkpoint(config.ckpt_path)["global_step"]

    def _find_checkpoint(self, ckpt_path: str) -> Path:
        """For a test, ``last`` is the checkpoint of the training recipe, whatever evaluation recipes follow it."""
        recipe, names = self.recipe, self.recipe.split("+")
        if self.subcommand != "fit":
            longest_first = ("+".join(names[:n]) for n in range(len(names), 0, -1))
            recipe = next((tried for tried in longest_first if runs.latest_run_folder(self.root, tried)), names[0])
        return runs.find_checkpoint(ckpt_path, self.root, recipe)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A Trainer that logs into the run's folder."""
        config = self.config_init[self.subcommand]
        trainer, asked = config.trainer, config.trainer.logger
        if asked is not False and not trainer.fast_dev_run:
            extra = asked if isinstance(asked, list) else [asked] if asked not in (True, None) else []
            trainer.logger = [self._run_logger(config.ckpt_path), *extra]
        bar = [StepProgressBar()] if trainer.enable_progress_bar is not False else []
        trainer.callbacks = [*(trainer.callbacks or []), *bar, *([Report()] if self.subcommand == "fit" else [])]
        try:
            return super().instantiate_trainer(**kwargs)
        except (TypeError, ValueError, MisconfigurationException) as error:
            raise UserError("The Trainer refuses its settings", got=error, do="correct --trainer.*") from error

    def before_fit(self) -> None:
        """Refuse a number of processes that does not divide the prompts, before those processes start."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RolloutCallback):
                replace(callback.collector.plan, world_size=self.trainer.num_nodes * self.trainer.num_devices)

    def _run_logger(self, ckpt_path: str | None) -> RunLogger:
        """A logger for a new run folder, or for the checkpoint's folder when a fit continues."""
        resumed = runs.run_folder_of(Path(ckpt_path)) if self.subcommand == "fit" and ckpt_path is not None else None
        if resumed is not None:
            step, most = self.checkpoint_step, self.config_init[self.subcommand].trainer.max_steps
            if 0 < most <= step:
                got = f"a checkpoint of step {step}, trainer.max_steps {most}"
                raise UserError("The run has nothing left to do", got=got, do="raise --trainer.max_steps to train on")
            rank_zero_info(f"Continuing the run in {resumed} from step {step}")
            return RunLogger(resumed, resume_step=step)
        if RUN_FOLDER in os.environ:
            return RunLogger(os.environ[RUN_FOLDER])
        if getattr(rank_zero_only, "rank", 0) > 0:  # torchrun, SLURM: the first process names the folder later
            return RunLogger(self.root / self.recipe / "unused")
        folder = RLIFCLI.created = runs.next_run_folder(self.root, self.recipe)
        os.environ[RUN_FOLDER] = str(folder)
        rank_zero_info(f"Run folder: {folder}")
        return RunLogger(folder)


class SaveConfig(SaveConfigCallback):
    """Writes config.yaml; a continued run keeps the settings of its earlier steps in a file next to it."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Copy the old file, then write the new one."""
        if trainer.is_global_zero and not self.already_saved and isinstance(trainer.logger, RunLogger):
            step, config = trainer.logger.resume_step, trainer.logger.folder / runs.CONFIG
            if step is not None and config.is_file():
                shutil.copyfile(config, config.with_name(f"config.until-step-{step}.yaml"))
        super().setup(trainer, pl_module, stage)


main = RLIFCLI.run
