"""The arithmetic of one rollout: prompts, groups, windows, slices and optimiser steps."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlif_lightning.errors import UserError


@dataclass(frozen=True)
class BatchPlan:
    """How a rollout is cut into optimiser steps (windows) and micro-batches (slices).

    A rollout holds ``prompts_per_step * steps_per_rollout`` prompts over all ranks. In each pass its groups
    are dealt at random into ``steps_per_rollout`` windows; a window is one optimiser step. The rows of a
    window are ordered by length and cut into ``slices`` micro-batches, so that a slice can be trimmed to its
    longest row.

    Args:
        prompts_per_step: Prompts of one optimiser step, over all ranks.
        group_size: Completions per prompt (G).
        micro_batch_size: Completions that go through one forward and backward on one rank; null: the whole
            window at once.
        passes: Optimisation passes over one rollout.
        steps_per_rollout: Optimiser steps in one pass over one rollout.
        world_size: Processes.

    Raises:
        UserError: The sizes do not divide, or a group is too small to compare completions.
    """

    prompts_per_step: int
    group_size: int
    micro_batch_size: int | None = None
    passes: int = 1
    steps_per_rollout: int = 1
    world_size: int = 1

    def __post_init__(self) -> None:
        """Check what can be wrong before anything is loaded."""
        for name in ("prompts_per_step", "passes", "steps_per_rollout", "world_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1", got=getattr(self, name))
        if self.group_size < 2:
            raise UserError(
                "group_size is too small: an advantage compares the completions of one prompt",
                got=self.group_size,
                expected="2 or more",
                do="set --rollout.group_size 8",
            )
        if self.prompts_per_step % self.world_size:
            raise UserError(
                "prompts_per_step does not divide by the number of processes",
                got=f"{self.prompts_per_step} prompts, {self.world_size} processes",
                do=f"set --rollout.prompts_per_step to a multiple of {self.world_size}",
            )
        if self.micro_batch_size is None:
            return
        if self.micro_batch_size < 1 or self.window_rows % self.micro_batch_size:
            divisors = [d for d in range(1, self.window_rows + 1) if self.window_rows % d == 0]
            raise UserError(
                "micro_batch_size does not divide the completions of one optimiser step",
                got=f"micro_batch_size {self.micro_batch_size}, {self.window_rows} completions per step "
                f"and process ({self.prompts_per_step} prompts x {self.group_size} / {self.world_size})",
                expected=f"one of {', '.join(map(str, divisors))}",
            )

    @property
    def rollout_prompts(self) -> int:
        """Prompts of one rollout over all ranks."""
        return self.prompts_per_step * self.steps_per_rollout

    @property
    def rank_prompts(self) -> int:
        """Prompts of one rollout on one rank (P)."""
        return self.rollout_prompts // self.world_size

    @property
    def window_rows(self) -> int:
        """Completions of one optimiser step on one rank."""
        return self.prompts_per_step * self.group_size // self.world_size

    @property
    def slices(self) -> int:
        """Micro-batches of one optimiser step (M): Lightning's ``accumulate_grad_batches``."""
        return 1 if self.micro_batch_size is None else self.window_rows // self.micro_batch_size

    @property
    def rollout_steps(self) -> int:
        """Optimiser steps that one rollout serves."""
        return self.passes * self.steps_per_rollout

    @property
    def rollout_batches(self) -> int:
        """Batches that the loader yields for one rollout."""
        return self.rollout_steps * self.slices

    @property
    def on_policy(self) -> bool:
        """Whether every update is taken by the very weights that sampled the rollout."""
        return self.rollout_steps == 1

    def in_order(self, rows: int) -> list[Tensor]:
        """Row numbers in slices of a micro-batch, where there is no update whose slices they could be."""
        return list(torch.arange(rows).split(self.micro_batch_size or rows))

    def cut(self, lengths: Tensor, generator: torch.Generator) -> list[list[Tensor]]:
        """Deal a rollout's rows into windows and slices.

        Args:
            lengths: [N] completion tokens; rows of a group lie next to each other.
            generator: Deals the groups into windows.

        Returns:
            ``rollout_steps`` windows of ``slices`` row-index tensors each. Each pass holds every row once.
        """
        rows = torch.arange(len(lengths)).view(-1, self.group_size)  # [P, G]
        windows = []
        for _ in range(self.passes):
            dealt = rows[torch.randperm(len(rows), generator=generator)] if self.steps_per_rollout > 1 else rows
            for window in dealt.chunk(self.steps_per_rollout):
                flat = window.flatten().sort().values
                order = lengths[flat].sort(descending=True, stable=True).indices
                windows.append(list(flat[order].chunk(self.slices)))
        return windows

    def describe(self) -> str:
        """One line: prompts x group = completions per step, and how they are cut."""
        text = (
            f"{self.prompts_per_step} prompts x {self.group_size} completions = "
            f"{self.prompts_per_step * self.group_size} completions per step"
        )
        text += f" ({self.world_size} processes x {self.slices} slices x {self.window_rows // self.slices} rows)"
        if self.rollout_steps > 1:
            text += f"; {self.rollout_steps} steps per rollout ({self.passes} passes x {self.steps_per_rollout})"
        return text
