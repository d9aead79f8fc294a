"""LightningCLI for RLIF: it turns settings into objects and gives every run a folder."""

import os
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import IO, Any, ClassVar

import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from rlif_lightning import callbacks
from rlif_lightning.callbacks.log_settings import LogSettings
from rlif_lightning.callbacks.trained_problems import check_problems
from rlif_lightning.cli.changed_settings import changed_settings, read_settings
from rlif_lightning.cli.command_table import COMMANDS
from rlif_lightning.cli.disk_failures import run_failure
from rlif_lightning.cli.environment import prepare, short_warnings
from rlif_lightning.cli.parser import Parser
from rlif_lightning.cli.recipes import shipped_recipes
from rlif_lightning.cli.user_classes import ClassMaker
from rlif_lightning.data.module import PromptDataModule
from rlif_lightning.errors import UserError, check_numbers, missing_package, said_by_python, users_mistake
from rlif_lightning.models.checkpoints import identity_of, newest_whole, read_checkpoint
from rlif_lightning.models.strategies import check_strategy
from rlif_lightning.runs import folder as runs
from rlif_lightning.runs import other_loggers
from rlif_lightning.runs.finished import is_finished
from rlif_lightning.runs.logger import RunLogger
from rlif_lightning.runs.signals import Stopped
from rlif_lightning.training.module import RLIFModule

RUN_FOLDER = "RLIF_RUN_FOLDER"  # tells the processes that Lightning starts which folder their run has
TRAINER_DEFAULTS = {"log_every_n_steps": 1, "num_sanity_val_steps": 0}
TRAINER_DEFAULTS |= {"enable_model_summary": False, "use_distributed_sampler": False}

# Lightning's Timer has an enum among its defaults, which config.yaml could not hold otherwise.
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, value: dumper.represent_data(value.value))


class RLIFCLI(LightningCLI):
    """``rlif fit | validate | test | predict``."""

    created: ClassVar[tuple[Path, Path] | None] = None  # root and run folder that this process has made: see `run`
    lock: ClassVar[IO[bytes] | None] = None  # keeps other processes out of the run folder
    checkpoint_step = 0  # optimiser steps of the checkpoint that a run continues from

    def __init__(self, command: str, *args: Any, **settings: Any) -> None:
        self.command = command
        super().__init__(*args, **settings)

    @classmethod
    def run(cls, arguments: list[str]) -> "RLIFCLI":
        """Parse and run one command: its name and the words after it."""
        prepare()
        try:
            cli = cls(arguments[0], RLIFModule, PromptDataModule, **cls.settings(arguments))
            if torch.distributed.is_initialized():
                torch.distributed.barrier()
                torch.distributed.destroy_process_group()  # gloo's threads may abort at exit
            return cli
        except BaseException as error:
            stopped = isinstance(error, Stopped)
            if cls.created is not None:
                runs.discard_run_folder(*cls.created, stopped)
            failure = run_failure(error, Path(cls.lock.name).parent if cls.lock else None)
            if failure is not None:
                raise failure from error
            if (stopped or users_mistake(error) is not None) and torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()  # with the exit code that belongs to it
            raise
        finally:
            cls.created = None
            if cls.lock is not None:
                cls.lock.close()
                cls.lock = None
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
        add = parser.add_lightning_class_args
        add(callbacks.MemoryCheck, "memory_check")  # first: before the evaluation takes its time
        add(callbacks.RolloutCallback, "rollout")
        add(callbacks.Evaluation, "evaluation")
        add(callbacks.CollapseGuard, "guard")
        add(callbacks.Completions, "completions")
        add(callbacks.RolloutCheckpoint, "checkpoint")
        logger = parser._option_string_actions["--trainer.logger"]
        logger._typehint |= other_loggers.Word | list[Logger | other_loggers.Word]
        parser.add_argument("--runs", default="runs", help="Folder of all runs; a run gets <runs>/<recipe>/<n>.")

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The command alone: a parser takes long to build. Without arguments that would do nothing here."""
        unused = {"weights_only", "return_predictions", "verbose", "dataloaders"}
        return {name: skip | unused for name, skip in LightningCLI.subcommands().items() if name == self.command}

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> Any:
        """As in the base class, with our own description: the Trainer's is about the Trainer, and cut short."""
        kwargs["description"] = COMMANDS[subcommand].description
        return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parse; the base class warns when arguments are given, which is how ``main`` always calls it."""
        short_warnings()
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Nothing: a value on the command line wins over one stored in a checkpoint."""

    @property
    def command_config(self) -> Any:
        """The settings of the command."""
        return self.config if self.subcommand is None else self.config[self.subcommand]

    def _set_seed(self) -> None:
        """Refuse numbers that nothing can take and empty names, then as in the base class."""
        check_numbers(self.command_config)
        for name in ("ckpt_path", "runs", "model.name", "model.adapter"):
            if self.command_config.get(name) == "":
                raise UserError(f"{name} is empty", do=f"write --{name} VALUE, or leave it out")
        try:
            super()._set_seed()
        except ValueError as error:
            raise UserError("seed_everything is out of range", got=error, expected="0 to 4294967295") from error

    def before_instantiate_classes(self) -> None:
        """Check the strategy and find the checkpoint before anything is loaded."""
        config = self.command_config
        strategy = config.trainer.strategy
        check_strategy(strategy if isinstance(strategy, str) else strategy.class_path)
        other_loggers.check_packages(other_loggers.asked_loggers(config.trainer.logger))
        self.root = runs.writable_folder(config.runs)
        self.recipe = runs.recipe_name(config.config)
        asked, found = config.ckpt_path, config.ckpt_path and self._find_checkpoint(config.ckpt_path)
        if found and found != Path(asked).expanduser():
            found = newest_whole(found)
        config.ckpt_path = found and str(found)
        if found:
            # Read here: a file that is no checkpoint is refused before anything is loaded.
            checkpoint = read_checkpoint(config.ckpt_path)
            identity_of(checkpoint)
            if self.subcommand == "fit" and "optimizer_states" not in checkpoint:
                wrong = "Training can't continue from weights alone: the optimiser's state is missing"
                do = "use them with test, validate, predict, diagnose or mix, or train with --guard.action restore"
                raise UserError(wrong, got=config.ckpt_path, do=do)
            step = self.checkpoint_step = checkpoint["global_step"]
            limits, run = (config.trainer.max_steps, config.trainer.max_epochs), runs.run_folder_of(found)
            if self.subcommand == "fit" and is_finished(run, step, limits, early=asked == "auto"):
                rank_zero_info(f"The run in {run} is complete at step {step}; raise --trainer.max_steps to train on.")
                raise SystemExit(0)

    def instantiate_classes(self) -> None:
        """As in the base class; what the class of a setting raises is told with the setting's name."""
        maker = ClassMaker(self.command_config)
        self.parser.add_instantiator(maker, object)
        try:
            super().instantiate_classes()
        except ValueError:  # jsonargparse's sum of what each type of a union says
            if maker.mistake is None:
                raise
        if maker.mistake is not None:
            raise maker.mistake

    def _find_checkpoint(self, ckpt_path: str) -> Path | None:
        """For a test, ``last`` is the checkpoint of the training recipe, whatever evaluation recipes follow it."""
        if ckpt_path == "auto":
            if self.subcommand != "fit":
                raise UserError("Only rlif fit can begin anew", got="--ckpt_path auto", expected="last, or a path")
            if not runs.can_continue(self.root, self.recipe):
                return None
        recipe, names = self.recipe, self.recipe.split("+")
        if self.subcommand != "fit":
            longest_first = ("+".join(names[:n]) for n in range(len(names), 0, -1))
            recipe = next((tried for tried in longest_first if runs.latest_run_folder(self.root, tried)), names[0])
        return runs.find_checkpoint(ckpt_path, self.root, recipe)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A Trainer that logs into the run's folder."""
        config = self.config_init[self.subcommand]
        trainer, asked = config.trainer, other_loggers.asked_loggers(config.trainer.logger)
        given = trainer.callbacks if isinstance(trainer.callbacks, list) else filter(None, [trainer.callbacks])
        trainer.callbacks = [*given]
        for key in self._parser(self.subcommand).callback_keys:
            kind = type(config[key])
            if kind in map(type, trainer.callbacks):
                wrong = f"trainer.callbacks names {kind.__name__}, which every run has"
                raise UserError(wrong, do=f"leave it out there, and set --{key}.*")
        own = self._run_logger(config.ckpt_path)
        own.tensorboard = "none" not in asked
        trainer.logger = [own, *(other_loggers.start_logger(x, own.folder, self.root) for x in asked if x != "none")]
        if trainer.enable_progress_bar is not False:
            trainer.callbacks.append(callbacks.StepProgressBar())
        if self.subcommand == "fit":
            given = [str(path) for path in self.command_config.config or []]
            names = {path: path for path in given} | {path: name for name, path in shipped_recipes().items()}
            settings = read_settings(self._parser("fit").dump(self.command_config, skip_none=False))
            trainer.callbacks += [LogSettings(settings), callbacks.Report([names[path] for path in given])]
        try:
            trainer = super().instantiate_trainer(**kwargs)
            # Else Lightning, under SLURM, continues from any hpc_ckpt_*.ckpt in the working folder unasked.
            trainer._checkpoint_connector._user_managed = config.ckpt_path is None
            return trainer
        except UserError:
            raise
        except Exception as error:  # of any kind: a package that is missing, a class that a setting names
            package, got = missing_package(error), said_by_python(error)
            do = f"pip install {package}" if package else "correct --trainer.*"
            raise UserError("The Trainer refuses its settings", got=got, do=do) from error

    def before_fit(self) -> None:
        """Refuse a number of processes that does not divide the prompts, before those processes start."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, callbacks.RolloutCallback):
                replace(callback.collector.plan, world_size=self.trainer.num_nodes * self.trainer.num_devices)

    def after_fit(self) -> None:
        """Say so if there was nothing to do."""
        if self.trainer.global_step == self.checkpoint_step:
            limits = (f"trainer.{name} {getattr(self.trainer, name)}" for name in ("max_steps", "max_epochs"))
            rank_zero_warn(f"Nothing was trained: the run ends at step {self.checkpoint_step} ({', '.join(limits)}).")

    def _run_logger(self, ckpt_path: str | None) -> RunLogger:
        """A logger for a new run folder, or for the checkpoint's folder when a fit continues."""
        resumed = runs.run_folder_of(Path(ckpt_path)) if self.subcommand == "fit" and ckpt_path is not None else None
        if resumed is not None:
            step = self.checkpoint_step
            if not getattr(rank_zero_only, "rank", 0):  # the first process writes for all
                RLIFCLI.lock = runs.lock_run(resumed)
            rank_zero_info(f"Continuing the run in {resumed} from step {step}")
            return RunLogger(resumed, resume_step=step)
        if RUN_FOLDER in os.environ:
            return RunLogger(os.environ[RUN_FOLDER])
        if getattr(rank_zero_only, "rank", 0) > 0:  # torchrun, SLURM: the first process names the folder later
            return RunLogger(self.root / self.recipe / "unused")
        trains = self.subcommand == "fit"
        root, kind = (self.root, self.recipe) if trains else (self.root / self.recipe, self.command)
        folder = runs.next_run_folder(root, kind, trains)
        RLIFCLI.created = self.root, folder
        RLIFCLI.lock = runs.lock_run(folder)
        os.environ[RUN_FOLDER] = str(folder)
        rank_zero_info(f"Run folder: {folder}")
        return RunLogger(folder)


class SaveConfig(SaveConfigCallback):
    """Writes config.yaml; a continued run keeps the settings of its earlier steps in a file next to it."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file; where a run continues, only refuse other data, before anything is loaded."""
        if self._continues(trainer):
            check_problems(trainer, read_checkpoint(self.config.ckpt_path))
        else:
            super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run continues, and nothing has refused the checkpoint: say what was changed since, and write the file."""
        if not self._continues(trainer):
            return
        folder, step = Path(str(trainer.log_dir)), trainer.global_step
        before = runs.keep_settings(folder, step) if trainer.is_global_zero else ""
        super().setup(trainer, pl_module, "fit")
        if before:
            was, now = map(read_settings, (before, (folder / runs.CONFIG).read_text(encoding="utf-8")))
            changes = ", ".join(changed_settings(was, now)) if was else "unknown, as config.yaml was damaged"
            if changes:
                rank_zero_info(f"Changed since step {step}: {changes}")

    @staticmethod
    def _continues(trainer: Trainer) -> bool:
        return isinstance(trainer.logger, RunLogger) and trainer.logger.resume_step is not None


main = RLIFCLI.run
