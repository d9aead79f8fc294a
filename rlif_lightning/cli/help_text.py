"""The order of ``rlif COMMAND --help``: what most runs set comes first, Lightning's Trainer last."""

from argparse import SUPPRESS, Action
from typing import Any

IMPORTANT = (
    "config", "ckpt_path", "runs", "seed_everything",
    "model.name", "model.optimizer", "model.optimizer.lr", "model.schedule", "model.warmup_ratio", "model.loss",
    "model.kl_coefficient", "model.lora", "model.quantization", "model.gradient_checkpointing",
    "data.train", "data.train.path", "data.val", "data.test", "data.template", "data.system_prompt",
    "rollout.rewards", "rollout.prompts_per_step", "rollout.group_size", "rollout.micro_batch_size",
    "rollout.max_new_tokens", "rollout.temperature", "rollout.sampler",
    "evaluation.every", "evaluation.n", "guard.action", "checkpoint.every",
    "trainer.max_steps", "trainer.precision", "trainer.devices",
)  # fmt: skip
WITHIN = {  # settings of a class or a source, which the parser has no entry of its own for
    "model.optimizer.lr": "Learning rate.",
    "data.train.path": "Data set to train on: a file, or the name of a hub data set.",
}
OUR_WORDS = {  # where Lightning speaks of what is not here
    "ckpt_path": "Checkpoint to start from: a file, a run folder, or 'last' for the newest run of the recipes.",
    "seed_everything": "Seed of all random numbers; true: that of the environment variable PL_GLOBAL_SEED, or 0.",
    "print_config": "Print the settings as a recipe and exit.",
    "help": "Show this help and exit; --help all: with the settings of Lightning's Trainer.",
}


def arrange_help(parser: Any, everything: bool) -> None:
    """Put the groups of a command's help in order; ``everything``: with the settings of Lightning's Trainer.

    A parser without the recipes' settings stays as it is; another is only good for its help afterwards.
    """
    actions = {action.dest: action for action in parser._actions}
    if "model.name" not in actions:
        return
    for name in actions.keys() & OUR_WORDS:
        actions[name].help = OUR_WORDS[name]
    for name, text in WITHIN.items():
        metavar = name.rpartition(".")[2].upper()
        actions[name] = Action([f"--{name}"], name, metavar=metavar, default=SUPPRESS, help=text)
    first = [actions[name] for name in IMPORTANT if name in actions]
    usual, groups = parser._action_groups[:2], parser._action_groups[2:]
    important = parser.add_argument_group("settings that matter most")
    for group in (*usual, *groups):
        group._group_actions = [action for action in group._group_actions if action not in first]
    important._group_actions = first
    own = [g for g in groups if g is not parser.groups.get("trainer")]
    parser._action_groups = [*usual, important, *own, *(g for g in groups if everything and g not in own)]
