"""The arithmetic of one rollout: prompts, groups, windows, slices and optimiser steps."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlif_lightning.errors import UserError, check_ranges

MOST_COMPLETIONS = 10**7
"""Of one rollout or of one evaluated problem: each has a seed, a text and an answer in this machine's memory."""


@dataclass(frozen=True)
class BatchPlan:
    """How a rollout is cut into optimiser steps (windows) and micro-batches (slices).

    A rollout holds ``prompts_per_step * steps_per_rollout`` prompts over all ranks. In each pass its groups
    are dealt at random into ``steps_per_rollout`` windows; a window is one optimiser step. The rows of a window are
    ordered by length and cut into ``slices`` micro-batches, so that a slice can be trimmed to its longest row. Sizes
    that do not divide are refused.
    """

    prompts_per_step: int  # over all ranks
    group_size: int  # completions per prompt (G)
    micro_batch_size: int | None = None  # completions of one forward and backward on a rank; None: the whole window
    passes: int = 1  # over one rollout
    steps_per_rollout: int = 1  # optimiser steps of one pass
    world_size: int = 1

    def __post_init__(self) -> None:
        """Check what can be wrong before anything is loaded."""
        for name in ("prompts_per_step", "passes", "steps_per_rollout", "world_size"):
            value = getattr(self, name)
            check_ranges("", (name, value, 1 <= value <= MOST_COMPLETIONS, f"1 to {MOST_COMPLETIONS}"))
        if self.group_size < 2:
            wrong = "group_size is too small: an advantage compares the completions of one prompt"
            raise UserError(wrong, got=self.group_size, expected="2 or more", do="set --rollout.group_size 8")
        rows = self.rollout_prompts * self.group_size * self.passes
        if rows > MOST_COMPLETIONS:
            got, sizes = f"{rows} completions", "prompts_per_step x group_size x steps_per_rollout x passes"
            raise UserError(f"A rollout is too large: {sizes}", got=got, expected=f"at most {MOST_COMPLETIONS}")
        if self.prompts_per_step % self.world_size:
            raise UserError(
                "prompts_per_step does not divide by the number of processes",
                got=f"{self.prompts_per_step} prompts, {self.world_size} processes",
                do=f"set --rollout.prompts_per_step to a multiple of {self.world_size}",
            )
        micro = self.window_rows if self.micro_batch_size is None else self.micro_batch_size
        if micro < 1 or self.window_rows % micro:
            divisors = [d for d in range(1, self.window_rows + 1) if self.window_rows % d == 0]
            raise UserError(
                "micro_batch_size does not divide the completions of one optimiser step",
                got=f"micro_batch_size {micro}, {self.window_rows} completions per step "
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
        """Deal rows with so many completion tokens [N], a group next to each other, into windows and slices.

        There are ``rollout_steps`` windows of ``slices`` tensors of row numbers. Each pass holds every row once.
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
        prompts, group = self.prompts_per_step, self.group_size
        text = f"{prompts} prompts x {group} completions = {prompts * group} completions per step"
        text += f" ({self.world_size} processes x {self.slices} slices x {self.window_rows // self.slices} rows)"
        if self.on_policy:
            return text
        return f"{text}; {self.rollout_steps} steps per rollout ({self.passes} passes x {self.steps_per_rollout})"
