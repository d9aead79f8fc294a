"""Recipes to objects, for commands that take the settings of ``rlif fit`` and run no loop of the Trainer's."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric import Fabric
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from rlif_lightning.callbacks import Evaluation, StepProgressBar
from rlif_lightning.cli.command_table import COMMANDS
from rlif_lightning.cli.environment import prepare
from rlif_lightning.cli.strangers import is_strange
from rlif_lightning.cli.trainer import RLIFCLI
from rlif_lightning.data.module import PromptDataModule
from rlif_lightning.data.prompts import Prompt
from rlif_lightning.errors import UserError, writing
from rlif_lightning.models.checkpoints import read_checkpoint
from rlif_lightning.models.loading import PolicySettings
from rlif_lightning.models.policy import Policy
from rlif_lightning.models.precision import precision_name
from rlif_lightning.runs.folder import CONFIG, next_run_folder
from rlif_lightning.sampling.check_decoding import check_decoding
from rlif_lightning.training.collector import Collector
from rlif_lightning.training.module import RLIFModule

Split = Literal["train", "val", "test", "predict"]
STAGES = {"train": "fit", "val": "validate", "test": "test", "predict": "predict"}


class RecipeObjects(RLIFCLI):
    """What a recipe names. Nothing is read and no weights are loaded before :meth:`prompts` and :meth:`policy`.

    Args:
        command: Its name; the words after it are read like those after ``rlif fit``.
        arguments: These words.
        add_options: Adds the command's own options to a parser.
    """

    module: RLIFModule  # its settings; the policy is a thing of its own here
    data: PromptDataModule
    collector: Collector
    evaluation: Evaluation
    device: torch.device  # the one on which the command computes
    precision: str  # trainer.precision by its longer name
    bar: StepProgressBar | None
    options: Any  # the command's own options, by name

    def __init__(self, command: str, arguments: list[str], add_options: Callable[[Any], None]) -> None:
        prepare(own_modules=not any(is_strange(command, word.rpartition("=")[2], arguments) for word in arguments))
        self.add_options = add_options
        # No `save_config_callback`: it belongs to a Trainer that runs.
        settings = {**self.settings(arguments), "save_config_callback": None}
        settings["parser_kwargs"] = {"prog": f"rlif {command}", "description": COMMANDS[command].description}
        super().__init__(command, RLIFModule, PromptDataModule, run=False, **settings)

    def add_arguments_to_parser(self, parser: Any) -> None:
        """The command's own options first."""
        self.add_options(parser)
        weights = "Weights of a checkpoint: a file, a run folder, or 'last'."
        parser.add_argument("--ckpt_path", type=str | None, default=None, help=weights)
        super().add_arguments_to_parser(parser)

    def instantiate_trainer(self, **kwargs: Any) -> None:  # type: ignore[override]
        """No Trainer: of its settings only device, precision and progress bar are taken."""
        settings = self.config_init.trainer
        devices = settings.devices[:1] if isinstance(settings.devices, list) else 1
        try:
            self.device = Fabric(accelerator=settings.accelerator, devices=devices).device
        except (TypeError, ValueError, RuntimeError, MisconfigurationException) as error:
            raise UserError("The Trainer refuses its settings", got=error, do="correct --trainer.*") from error
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.precision = precision_name(settings.precision, self.device.type)

    def after_instantiate_classes(self) -> None:
        """Name the objects."""
        self.module, self.data, self.options = self.model, self.datamodule, self.config_init
        self.collector, self.evaluation = self.options.rollout.collector, self.options.evaluation
        self.module.collector = self.collector  # whose engine evaluates as well, where no other is given
        self.module.policy_settings = replace(self.module.policy_settings, stop=self.options.rollout.stop)
        self.bar = StepProgressBar() if self.options.trainer.enable_progress_bar is not False else None

    def prompts(self, split: Split = "train") -> list[Prompt]:
        """Read and encode the problems of a split; this loads the tokenizer only."""
        self.data.tokenizer = self.module.tokenizer
        self.data.setup(STAGES[split])
        return self.data.prompts[split]

    @property
    def policy_settings(self) -> PolicySettings:
        """The module's, with the end of an answer in the chat template."""
        return replace(self.module.policy_settings, turn_end=self.data.template.turn_end(self.module.tokenizer))

    def policy(self, training: bool = False) -> Policy:
        """Load the weights, those of ``--ckpt_path`` where given, onto the device; to train: as a fit keeps them."""
        settings, tokenizer = self.policy_settings, self.module.tokenizer
        policy = Policy.load(settings, self.device, self.precision, training, tokenizer=tokenizer)
        check_decoding(policy.model, policy.end_ids, policy.pad_id)
        if self.options.ckpt_path is not None:
            policy.restore(read_checkpoint(self.options.ckpt_path))
        policy.move()
        return policy

    def output(self, folder: str | None = None) -> Path:
        """The folder for results, made: the given one, or ``<runs>/<recipe>/<command>/<n>``, with config.yaml."""
        path = Path(folder).expanduser() if folder else next_run_folder(self.root / self.recipe, self.command)
        try:
            with writing(path):
                path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError("The output folder can't be made", got=f"{path}: {error.strerror}") from error
        with writing(path / CONFIG):
            self.parser.save(self.config, path / CONFIG, skip_none=False, overwrite=True, multifile=False)
        return path
