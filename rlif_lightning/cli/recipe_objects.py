"""Recipes to objects, for commands that take the settings of ``rlif fit`` and run no loop of the Trainer's."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Trainer
from torch import nn

from rlif_lightning.callbacks import Evaluation, RolloutCallback, StepProgressBar
from rlif_lightning.callbacks.checkpoint import read_checkpoint
from rlif_lightning.cli.environment import prepare
from rlif_lightning.cli.trainer import RLIFCLI
from rlif_lightning.data.module import PromptDataModule
from rlif_lightning.data.prompts import Prompt
from rlif_lightning.errors import UserError
from rlif_lightning.runs.folder import CONFIG, next_run_folder
from rlif_lightning.training.module import RLIFModule

Split = Literal["train", "val", "test", "predict"]
STAGES = {"train": "fit", "val": "validate", "test": "test", "predict": "predict"}


@dataclass
class RecipeObjects:
    """What a recipe names. Nothing is read and no weights are loaded before :meth:`prompts` and :meth:`policy`."""

    command: str
    recipe: str  # the names of the recipes, joined by +
    runs: Path  # the folder of all runs
    module: RLIFModule
    data: PromptDataModule
    rollout: RolloutCallback
    evaluation: Evaluation
    trainer: Trainer  # of one device; it never runs: device and precision are taken from it
    options: Any  # the command's own options, by name
    cli: RLIFCLI

    def prompts(self, split: Split = "train") -> list[Prompt]:
        """Read and encode the problems of a split; this loads the tokenizer only."""
        self.data.setup(STAGES[split])
        return self.data.prompts[split]

    def policy(self, training: bool = False) -> nn.Module:
        """Load the weights, those of ``--ckpt_path`` where it is given, onto the device.

        Args:
            training: In the precision that training keeps them in, with what training loads beside them.

        Raises:
            UserError: There is no such model, or the checkpoint is another one's.
        """
        trainer, module = self.trainer, self.module
        trainer.training = training
        trainer.strategy.setup_environment()
        module.configure_model()
        if self.options.ckpt_path is not None:
            checkpoint = read_checkpoint(self.options.ckpt_path)
            module.on_load_checkpoint(checkpoint)
            module.load_state_dict(checkpoint["state_dict"], strict=False)
        trainer.precision_plugin.convert_module(module)
        trainer.strategy.model_to_device()
        assert module.policy is not None
        return module.policy

    def output(self, folder: str | None = None) -> Path:
        """The folder for results, made: the given one, or ``<runs>/<recipe>/<command>/<n>``, with config.yaml.

        Raises:
            UserError: It can't be created.
        """
        if folder is None:
            path = next_run_folder(self.runs / self.recipe, self.command)
        else:
            path = Path(folder).expanduser()
            try:
                path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError("The output folder can't be made", got=f"{path}: {error.strerror}") from error
        self.cli.parser.save(self.cli.config, path / CONFIG, skip_none=False, overwrite=True, multifile=False)
        return path


def load(
    command: str,
    arguments: list[str],
    add_options: Callable[[Any], None],
    description: str | None = None,
    make: "type[PlainCLI] | None" = None,
) -> RecipeObjects:
    """Read the words after ``rlif <command>`` like those after ``rlif fit``.

    Args:
        command: Its name.
        arguments: The words after it.
        add_options: Adds the command's own options to a parser.
        description: For ``--help``.
        make: Another class that reads the settings.

    Raises:
        UserError: A word or a recipe is wrong.
        SystemExit: After ``--help`` or ``--print_config``.
    """
    prepare()
    cli = (make or PlainCLI)(command, arguments, add_options, description)
    module, data, trainer = cli.model, cli.datamodule, cli.trainer
    trainer.strategy.connect(module)
    module.trainer = data.trainer = trainer
    trainer.datamodule = data  # type: ignore[attr-defined]
    init = cli.config_init
    init.evaluation.take_sampler(trainer)
    return RecipeObjects(
        command, cli.recipe, cli.root, module, data, init.rollout, init.evaluation, trainer, init, cli
    )


class PlainCLI(RLIFCLI):
    """The settings of ``rlif fit`` for a command that is none of the Trainer's.

    Args:
        command: Its name.
        arguments: The words after it.
        add_options: Adds the command's own options to the parser.
        description: For ``--help``.
    """

    def __init__(
        self, command: str, arguments: list[str], add_options: Callable[[Any], None], description: str | None
    ) -> None:
        self.add_options = add_options
        # No `save_config_callback`: it belongs to a Trainer that runs.
        settings = {**self.settings(arguments), "save_config_callback": None}
        settings["parser_kwargs"] = {"prog": f"rlif {command}", "description": description}
        super().__init__(RLIFModule, PromptDataModule, run=False, **settings)

    def add_arguments_to_parser(self, parser: Any) -> None:
        """The command's own options first."""
        self.add_options(parser)
        parser.add_argument("--ckpt_path", type=str | None, default=None,
                            help="Weights of a checkpoint: a file, a run folder, or 'last'.")  # fmt: skip
        super().add_arguments_to_parser(parser)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A Trainer of one device, without loggers."""
        settings = self.config_init.trainer
        devices = settings.devices
        bar = [StepProgressBar()] if settings.enable_progress_bar is not False else []
        settings.callbacks = [*(settings.callbacks or []), *bar]
        one = {"devices": devices[:1] if isinstance(devices, list) else 1, "num_nodes": 1, "strategy": "auto"}
        return self.make_trainer(logger=False, **one)
