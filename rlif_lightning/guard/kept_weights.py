"""Copies of the trainable weights of a few steps: in memory, and in a folder where they outlive the process."""

import warnings
from pathlib import Path

from torch import nn

from rlif_lightning.errors import UserError
from rlif_lightning.models.trainable import Weights, load_trainable, save_trainable, trainable_weights

FILE = "weights.safetensors"


class KeptWeights:
    """Holds as many copies as it is told to, no more, and as many files.

    ``weights.safetensors`` holds the weights to hand back, ``step=<n>.safetensors`` others that may be next.
    """

    def __init__(self) -> None:
        self.steps: dict[int, Weights] = {}
        self._written: dict[Path, int] = {}

    def keep(self, needed: set[int], step: int, policy: nn.Module, first: bool = True) -> None:
        """Let go of what is no longer needed; copy the weights of the current step if they are.

        Where the policy's weights are shared out, to be called on all processes; the first keeps them.
        """
        self.steps = {n: weights for n, weights in self.steps.items() if n in needed}
        if step in needed:  # though they may have been read from a file: that only the first process knows
            weights = trainable_weights(policy, keep=first)
            if first:
                self.steps[step] = weights

    def write(self, folder: Path, handed: int | None, **facts: object) -> None:
        """Bring all copies to the disk, unless they are there already, and remove other files."""
        names = {folder / (FILE if n == handed else f"step={n}.safetensors"): n for n in self.steps}
        for path, step in names.items():
            if self._written.get(path) != step:
                save_trainable(self.steps[step], path, step=step, **(facts if step == handed else {}))
        for path in set(folder.glob("*.safetensors")) - set(names):
            path.unlink()
        self._written = names

    def read(self, folder: Path, needed: set[int]) -> list[int]:
        """Read the needed steps from a folder; returns the steps of files that are not."""
        others = []
        for path in sorted(folder.glob("*.safetensors")):
            try:
                weights, facts = load_trainable(path)
                step = int(facts["step"])
            except (UserError, KeyError, ValueError):
                warnings.warn(f"Collapse guard: {path} is damaged: the run goes on without it.", stacklevel=1)
                continue
            if step in needed:
                self.steps[step] = weights
                self._written[path] = step
            else:
                others.append(step)
        return others
