"""``rlif COMMAND --help``: one screen of what people change, with examples. This imports nothing heavy."""

from argparse import SUPPRESS, Action
from typing import Any

from rlif_lightning.cli.command_table import COMMANDS

ALWAYS, FIT = "fit validate test predict", "fit"
SETTINGS = (  # setting, an example of its value, what it is, and the commands that use it
    ("config", "gsm8k", "a shipped recipe, or a YAML file", ALWAYS),
    ("ckpt_path", "last", "continue a run, or a checkpoint", ALWAYS),
    ("model.optimizer.lr", "1e-5", "learning rate", FIT),
    ("trainer.max_steps", "60", "optimiser steps", FIT),
    ("rollout.rewards", "[TokenEntropy]", "what is rewarded (--help reward)", FIT),
    ("model.name", "Qwen/Qwen2.5-1.5B", "a folder, or a name on the hub", ALWAYS),
    ("model.lora", "{r: 32}", "train a LoRA adapter; null: all weights", ALWAYS),
    ("model.quantization", "nf4", "frozen weights in 4 bits", ALWAYS),
    ("model.kl_coefficient", "0.005", "pull towards the start (beta)", FIT),
    ("model.loss", "dr_grpo", "grpo dapo bnpo dr_grpo gspo cispo", FIT),
    ("model.schedule", "cosine", "course of the learning rate", FIT),
    ("model.warmup_ratio", "0.1", "share of the steps with a rising one", FIT),
    ("model.gradient_checkpointing", "true", "less memory, slower", FIT),
    ("data.train.path", "problems.jsonl", "a file, or a data set of the hub", FIT),
    ("data.val.path", "held_out.jsonl", "held-out problems", "fit validate"),
    ("data.test.path", "test.jsonl", "test problems", "test"),
    ("limit", "50", "this many problems, drawn at random", "validate test predict"),
    ("data.predict.path", "prompts.jsonl", "problems to complete", "predict"),
    ("data.system_prompt", "Think first.", "before each problem", ALWAYS),
    ("data.answers.completion", "boxed", "where a completion has its answer", ALWAYS),
    ("rollout.prompts_per_step", "16", "prompts of a step (batch size)", FIT),
    ("rollout.group_size", "8", "completions per prompt", FIT),
    ("rollout.micro_batch_size", "8", "completions at a time: less memory", FIT),
    ("rollout.max_new_tokens", "512", "longest completion", FIT),
    ("rollout.temperature", "1.0", "of sampling", FIT),
    ("evaluation.every", "10", "steps between evaluations", FIT),
    ("evaluation.n", "100", "problems of an evaluation", FIT),
    ("evaluation.samples", "4", "samples per problem besides greedy", ALWAYS),
    ("evaluation.max_new_tokens", "512", "longest answer", ALWAYS),
    ("guard.action", "stop", "on a collapse: warn, stop, restore", FIT),
    ("checkpoint.every", "10", "steps between checkpoints", FIT),
    ("trainer.precision", "bf16-mixed", "numbers of the computation", ALWAYS),
    ("trainer.devices", "1", "GPUs of this machine", ALWAYS),
    ("trainer.logger", "wandb", "also mlflow trackio csv; none: files only", ALWAYS),
    ("runs", "runs", "folder of all runs", ALWAYS),
    ("seed_everything", "0", "seed of all random numbers", ALWAYS),
)
ALIASES = {  # what people call a setting elsewhere
    alias: name
    for name, aliases in (
        ("model.optimizer.lr", "lr learning_rate learning-rate model.lr model.learning_rate"),
        ("trainer.max_steps", "steps max_steps max-steps trainer.steps"),
        ("trainer.max_epochs", "epochs max_epochs num_train_epochs"),
        ("rollout.rewards", "reward rewards reward_funcs rollout.reward"),
        ("model.name", "model_name model_name_or_path"),
        ("rollout.prompts_per_step", "batch_size batch-size per_device_train_batch_size"),
        ("model.kl_coefficient", "beta kl kl_coef kl_coefficient"),
        ("rollout.group_size", "group_size num_generations n"),
        ("rollout.max_new_tokens", "max_new_tokens max_completion_length"),
        ("rollout.temperature", "temperature"),
        ("data.train.path", "dataset train"),
        ("runs", "output output_dir out"),
        ("ckpt_path", "resume checkpoint resume_from_checkpoint"),
        ("seed_everything", "seed"),
        ("trainer.precision", "precision dtype"),
        ("trainer.devices", "gpus devices"),
    )
    for alias in aliases.split()
}
WITHIN = {  # settings of a class or a source, which the parser has no entry of its own for
    "model.optimizer.lr": "Learning rate.",
    "data.train.path": "Data set to train on: a file, or the name of a hub data set.",
}
OUR_WORDS = {  # where Lightning speaks of what is not here
    "ckpt_path": "Checkpoint to start from: a file, a run folder, or 'last' for the newest run of the recipes.",
    "seed_everything": "Seed of all random numbers; true: that of the environment variable PL_GLOBAL_SEED, or 0.",
    "trainer.logger": "What logs besides the run's own files: wandb, mlflow, trackio, csv, classes, or a list; "
    "none or false: not even TensorBoard.",
    "print_config": "Print the settings as a recipe and exit.",
    "help": "Show this help and exit; --help WORD: every setting about it; --help all.",
}


def short_help(command: str) -> str:
    """What people change, with examples, for a command of the Trainer."""
    shown = [(f"--{name} {_quoted(value)}", text) for name, value, text, use in SETTINGS if command in use.split()]
    width = max(len(example) for example, _ in shown)
    lines = [f"  {example:<{width}}  {text}" for example, text in shown]
    return "\n".join(
        [
            f"usage: rlif {command} [--config RECIPE ...] [--setting VALUE ...]",
            "",
            COMMANDS[command].description,
            "",
            *lines,
            "",
            f"rlif {command} --help guard   settings about a word; also reward, lr, lora",
            f"rlif {command} --help all     every setting",
            f"rlif {command} --config quickstart --print_config   the settings as a recipe",
        ]
    )


def _quoted(value: str) -> str:
    return f"'{value}'" if set(value) & set("[]{} ") else value


def arrange_help(parser: Any, word: str | None) -> None:
    """Keep the settings about a word in a command's help, by name or text; all: everything; None: its own options.

    A parser without the recipes' settings stays as it is; another is only good for its help afterwards.
    """
    actions = {action.dest: action for action in parser._actions}
    if "model.name" not in actions:
        return
    for name in actions.keys() & OUR_WORDS:
        actions[name].help = OUR_WORDS[name]
    usual, groups = parser._action_groups[:2], parser._action_groups[2:]
    for name, text in WITHIN.items():
        metavar = name.rpartition(".")[2].upper()
        usual[1]._group_actions.append(Action([f"--{name}"], name, metavar=metavar, default=SUPPRESS, help=text))
    if word is None:
        parser._action_groups = usual
        parser.epilog = "Beside these, the settings of rlif fit; --help WORD: every setting about it; --help all."
    elif word != "all":
        for group in (*usual, *groups):
            found = [a for a in group._group_actions if word.lower() in f"{a.dest} {a.help}".lower()]
            group._group_actions = found
        parser._action_groups = [*usual, *(group for group in groups if group._group_actions)]
