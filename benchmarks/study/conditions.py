"""What the study varies: each condition is the quickstart with a few other settings."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
from toys import build

from rlif_lightning.mixing.folder import save_mix
from rlif_lightning.mixing.weights import Pair
from rlif_lightning.runs.pictures import in_words

ROOM = "rlif_lightning.rewards"
LEARNING_RATE = "--model.optimizer.init_args.lr"


@dataclass(frozen=True)
class Condition:
    """Settings of the command line, and the base model's name with the seed left open."""

    arguments: tuple[str, ...]
    base: str = "toy:{seed}"

    def model(self, seed: int, folder: Path) -> str:
        """The base model of a seed, made where it is not the package's.

        ``mixed:k:a`` is made of ``toy:k`` and a share a of ``toy-tuned:k``; the others are those of toys.py.
        """
        name = self.base.format(seed=seed)
        kind, *rest = name.split(":")
        target = folder / name.replace(":", "-")
        if kind in ("addition", "narrow"):
            build(kind, seed, target)
        elif kind != "mixed":
            return name
        elif not target.exists():
            save_mix(Pair(f"toy:{rest[0]}", f"toy-tuned:{rest[0]}"), float(rest[1]), target)
        return str(target)


def reward(name: str, *more: str, base: str = "toy:{seed}", **settings: object) -> Condition:
    """One reward by its class name."""
    given = ", ".join(f"{key}: {value}" for key, value in settings.items())
    text = f"--rollout.rewards=[{{class_path: {ROOM}.{name}, init_args: {{{given}}}}}]"
    return Condition((text, *more), base)


SELF, TOKEN, TRAJECTORY = "SelfCertainty", "TokenEntropy", "TrajectoryEntropy"

GUARD = {
    "self_certainty": reward(SELF),
    "token_entropy": reward(TOKEN),
    "trajectory_entropy": reward(TRAJECTORY),
    "trajectory_entropy_fast": reward(TRAJECTORY, f"{LEARNING_RATE}=1e-3"),
    "frozen_self_certainty": reward(SELF, annotator="reference"),
    "frozen_token_entropy": reward(TOKEN, annotator="reference"),
    "mixed": reward(SELF, base="mixed:{seed}:0.25"),
    "tuned": reward(SELF, base="toy-tuned:{seed}"),
    "verifiable": reward("Verifiable"),
    "majority_vote": reward("MajorityVote"),
    "random": reward("Random"),
}
"""What the guard is judged on."""

SECOND = ("--config", str(Path(__file__).with_name("toy_addition.yaml")))
SECOND_TASK = {
    f"addition_{name}": reward(cls, *SECOND, base="addition:{seed}")
    for name, cls in (
        ("self_certainty", SELF),
        ("token_entropy", TOKEN),
        ("trajectory_entropy", TRAJECTORY),
        ("verifiable", "Verifiable"),
        ("random", "Random"),
    )
}
"""The same rule on a task for which nothing was tuned."""

REWARDS = {
    "expected_agreement": reward("ExpectedAgreement"),
    "probability_margin": reward("ProbabilityMargin"),
    "cluster_frequency": reward("ClusterFrequency"),
    "format": reward("Format"),
    "short": reward("Length", prefer="short"),
    "long": reward("Length", prefer="long"),
    "wrong_sign": reward(SELF, weight=-1.0),
    "shuffled": reward("Shuffled", reward=f"{{class_path: {ROOM}.{SELF}}}"),
}
"""The other rewards and controls."""

ABLATIONS = {
    "kl_0": reward(SELF, "--model.kl_coefficient=0", "--guard.signals=[agreement]"),
    "kl_0.1": reward(SELF, "--model.kl_coefficient=0.1"),
    "kl_0.5": reward(SELF, "--model.kl_coefficient=0.5"),
    "slow": reward(SELF, f"{LEARNING_RATE}=1e-4"),
    "fast": reward(SELF, f"{LEARNING_RATE}=1e-3"),
    "group_4": reward(SELF, "--rollout.group_size=4", "--rollout.prompts_per_step=32"),
    "group_16": reward(SELF, "--rollout.group_size=16", "--rollout.prompts_per_step=8"),
    "mixed_10": reward(SELF, base="mixed:{seed}:0.1"),
    "mixed_50": reward(SELF, base="mixed:{seed}:0.5"),
    "narrow": reward(SELF, base="narrow:{seed}"),
}
"""One setting of the self-certainty run changed; group sizes at the same number of completions."""

CONDITIONS = {**GUARD, **SECOND_TASK, **REWARDS, **ABLATIONS}

TITLES = {
    "trajectory_entropy_fast": "trajectory entropy, 1e-3",
    "frozen_self_certainty": "self-certainty, frozen annotator",
    "frozen_token_entropy": "token entropy, frozen annotator",
    "mixed": "self-certainty, 25 % mixed start",
    "tuned": "self-certainty, tuned start",
    "short": "length, short",
    "long": "length, long",
    "wrong_sign": "self-certainty, wrong sign",
    "shuffled": "self-certainty, shuffled",
    "kl_0": "KL 0",
    "kl_0.1": "KL 0.1",
    "kl_0.5": "KL 0.5",
    "slow": "learning rate 1e-4",
    "fast": "learning rate 1e-3",
    "group_4": "32 prompts x 4 completions",
    "group_16": "8 prompts x 16 completions",
    "mixed_10": "10 % tuned start",
    "mixed_50": "50 % tuned start",
    "narrow": "narrow start",
}
"""Conditions whose names do not say it."""

GROUPS = {
    "Internal rewards": (
        "self_certainty", "token_entropy", "trajectory_entropy", "trajectory_entropy_fast", "expected_agreement",
        "probability_margin",
    ),
    "Another annotator or start": ("frozen_self_certainty", "frozen_token_entropy", "mixed", "tuned"),
    "Votes and labels": ("majority_vote", "cluster_frequency", "verifiable"),
    "Controls": ("random", "format", "short", "long", "wrong_sign", "shuffled"),
    "KL to the reference": ("kl_0", "kl_0.1", "kl_0.5"),
    "Learning rate": ("slow", "fast"),
    "Size of a group": ("group_4", "group_16"),
    "Start": ("mixed_10", "mixed_50", "narrow"),
}  # fmt: skip
"""What belongs together in a picture."""


def title(name: str) -> str:
    """A condition in plain words; the second task's have those of the first."""
    name = name.removeprefix("addition_")
    return TITLES.get(name, in_words(name))


def grouped(names: Sequence[str]) -> dict[str, list[str]]:
    """The conditions by group, without the empty groups."""
    found = {group: [name for name in members if name in names] for group, members in GROUPS.items()}
    return {group: members for group, members in found.items() if members}
