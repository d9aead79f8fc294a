"""What the study varies: each condition is the quickstart with a few other settings."""

from dataclasses import dataclass

ROOM = "rlif_lightning.rewards"
LEARNING_RATE = "--model.optimizer.init_args.lr"


@dataclass(frozen=True)
class Condition:
    """Settings of the command line, and the base model's name with the seed left open."""

    arguments: tuple[str, ...]
    base: str = "toy:{seed}"

    def model(self, seed: int) -> str:
        """The base model of a seed."""
        return self.base.format(seed=seed)


def reward(name: str, *more: str, base: str = "toy:{seed}", **settings: object) -> Condition:
    """One reward by its class name."""
    given = ", ".join(f"{key}: {value}" for key, value in settings.items())
    text = f"--rollout.rewards=[{{class_path: {ROOM}.{name}, init_args: {{{given}}}}}]"
    return Condition((text, *more), base)


CONDITIONS = {
    "self_certainty": reward("SelfCertainty"),
    "token_entropy": reward("TokenEntropy"),
    "trajectory_entropy": reward("TrajectoryEntropy"),
    "trajectory_entropy_fast": reward("TrajectoryEntropy", f"{LEARNING_RATE}=1e-3"),
    "verifiable": reward("Verifiable"),
    "random": reward("Random"),
    "tuned": reward("SelfCertainty", base="toy-tuned:{seed}"),
}
