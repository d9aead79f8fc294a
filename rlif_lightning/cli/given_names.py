"""Names on a command line of the Trainer: typos, those of other tools, and those that do nothing in the command.

A recipe may hold what its command does not use: there only the command line is judged. This imports nothing heavy.
"""

from collections.abc import Sequence

from rlif_lightning.cli.help_text import ALIASES
from rlif_lightning.cli.removed import what_to_do
from rlif_lightning.cli.setting_names import CLASSES, setting_names
from rlif_lightning.errors import UserError, did_you_mean

SHORT = {"limit": "evaluation.limit"}
"""Settings with a short name of their own."""

TRAINING = {  # of the model, the data and the Trainer
    "model": "loss clip_low clip_high kl_coefficient kl_estimator reference reference_every ema_decay optimizer "
    "entropy_coefficient target_entropy top_entropy_fraction schedule warmup_ratio gradient_checkpointing",
    "data": "train max_prompt_tokens",
    "trainer": "max_steps max_epochs min_steps min_epochs max_time limit_train_batches overfit_batches "
    "accumulate_grad_batches gradient_clip_val gradient_clip_algorithm val_check_interval check_val_every_n_epoch",
    "evaluation": "every n",
}
TRAINS = ["rollout", "guard", "checkpoint", "completions", "memory_check"]
TRAINS += [f"{group}.{name}" for group, names in TRAINING.items() for name in names.split()]
UNUSED = {
    "fit": ["evaluation.limit"],
    "validate": [*TRAINS, "data.test", "data.predict", "evaluation.predictions"],
    "test": [*TRAINS, "data.val", "data.predict", "evaluation.predictions"],
    "predict": [*TRAINS, "data.val"],
}
"""Settings, or groups of them, that a command makes no use of."""

USED = ("rollout.sampler", "rollout.stop")
"""Settings of these groups that it does use: what ends a text, and the engine if evaluation.sampler names none."""

INSTEAD = {
    "evaluation.limit": "evaluation.n",
    "evaluation.n": "limit",
    "rollout.group_size": "evaluation.samples",
    "rollout.max_new_tokens": "evaluation.max_new_tokens",
    "rollout.micro_batch_size": "evaluation.batch_size",
    "rollout.temperature": "evaluation.temperature",
}
"""What to set instead of an unused setting."""


def spelled_out(words: Sequence[str]) -> list[str]:
    """The words of a command line, with the whole names of settings that have a short one."""
    found = []
    for word in words:
        name, equals, value = word.partition("=")
        long = SHORT.get(name.removeprefix("--")) if name.startswith("--") else None
        found.append(word if long is None else f"--{long}{equals}{value}")
    return found


def check_names(command: str, words: Sequence[str]) -> None:
    """Refuse names that no setting has, and settings that do nothing in the command, with the name to use."""
    known = [*setting_names(), *(SHORT if command != "fit" else ())]
    for name in (word.partition("=")[0].removeprefix("--") for word in words if word.startswith("--")):
        if " " in name:  # argparse takes it for a value, such as "--- Question"
            continue
        setting = ALIASES.get(name, name)
        unused = is_unused(command, setting)
        better = INSTEAD.get(setting) if unused else None
        if name in ALIASES and (better or not unused):
            raise UserError(f"No setting is called '--{name}'", do=f"did you mean --{better or setting}?")
        if unused:
            short = next((short for short, long in SHORT.items() if long == name), name)
            other = f"set --{better}" if better else "leave it out; a recipe may hold it"
            raise UserError(f"--{short} does nothing in rlif {command}", do=other)
        if not _is_known(name, known) and not what_to_do(name):
            do = did_you_mean(name, known, "--{}".format) or f"see rlif {command} --help"
            raise UserError(f"No setting is called '--{name}'", do=do)


def _is_known(name: str, known: Sequence[str]) -> bool:
    """Whether it is a setting, a group of them, or a part of one whose own settings are not known here."""
    name = name.removesuffix("+")
    return name in CLASSES or any(f"{name}.".startswith(f"{other}.") for other in known)


def is_unused(command: str, setting: str) -> bool:
    """Whether a command of the Trainer makes no use of a setting."""

    def within(groups: Sequence[str]) -> bool:
        return any(f"{setting.removesuffix('+')}.".startswith(f"{group}.") for group in groups)

    return within(UNUSED[command]) and not within(USED)
