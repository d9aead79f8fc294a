"""The commands of ``rlif``: where each one lives, and its purpose in a line. This imports nothing heavy."""

from typing import NamedTuple


class Command(NamedTuple):
    """A command: the module whose ``main`` runs it, and what it is for."""

    module: str
    purpose: str

    @property
    def description(self) -> str:
        """The purpose as a sentence."""
        return f"{self.purpose[0].upper()}{self.purpose[1:]}."


TRAINER = "rlif_lightning.cli.trainer"
ROOM = "rlif_lightning.commands"
COMMANDS = {
    "fit": Command(TRAINER, "train a model; a run folder holds checkpoints, curves and completions"),
    "validate": Command(TRAINER, "evaluate on the validation problems"),
    "test": Command(TRAINER, "evaluate on the test problems"),
    "predict": Command(TRAINER, "complete problems and write what the model says"),
    "plan": Command(f"{ROOM}.plan", "compute the memory that a recipe needs, before anything is loaded"),
    "diagnose": Command(f"{ROOM}.diagnose", "find out whether internal rewards suit a model, and which of them"),
    "mix": Command(f"{ROOM}.mix", "interpolate the weights of two models and measure every mixture"),
    "export": Command(
        f"{ROOM}.export",
        "write a run's weights as a Hugging Face folder or a PEFT adapter (rlif export RUN)",
    ),
    "sample": Command(f"{ROOM}.sample", 'ask a run\'s model questions (rlif sample RUN "question")'),
    "report": Command(f"{ROOM}.report", "redraw a run's curves and table, or overlay several runs"),
}
