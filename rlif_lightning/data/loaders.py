"""Which prompts come when: a loader for training that resumes exactly, and one for evaluation."""

import os
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

from rlif_lightning.data.batch_plan import BatchPlan
from rlif_lightning.errors import UserError
from rlif_lightning.functional.seeds import completion_seed


def run_seed() -> int:
    """The seed of the run, as ``seed_everything`` left it; 0 without one."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


class PromptLoader:
    """Yields the rows of a rollout's prompts once per slice of the rollout, and resumes exactly.

    Row numbers, not prompts: batches pass through Lightning, which looks into them for tensors. Their order is a
    function of (seed, epoch), the same on one process and on many; each process takes its own part of every rollout;
    the prompts of an epoch that do not fill a rollout are dropped. Fewer prompts than one rollout needs are refused.
    """

    def __init__(self, count: int, plan: BatchPlan, rank: int = 0, seed: int = 0) -> None:
        self.count, self.plan, self.rank, self.seed = count, plan, rank, seed
        self.rollouts = count // plan.rollout_prompts  # in an epoch
        self.yielded = 0  # batches since the start of training; an epoch edge is no special case
        if self.rollouts == 0:
            raise UserError(
                "The data set is smaller than one rollout",
                got=f"{count} prompts",
                expected=f"at least {plan.rollout_prompts}",
                do="lower --rollout.prompts_per_step or --rollout.steps_per_rollout",
            )

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self.rollouts * self.plan.rollout_batches

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Continue from where the loader stands to the end of the epoch."""
        epoch, start = divmod(self.yielded, len(self))
        generator = torch.Generator().manual_seed(completion_seed(self.seed, epoch))
        order = torch.randperm(self.count, generator=generator).tolist()
        for batch in range(start, len(self)):
            rollout, part = divmod(batch, self.plan.rollout_batches)
            first = rollout * self.plan.rollout_prompts + self.rank * self.plan.rank_prompts
            places = range(first, first + self.plan.rank_prompts)
            self.yielded += 1
            yield {"rows": [order[p] for p in places], "positions": [(epoch, p) for p in places], "slice": part}

    def state_dict(self) -> dict[str, int]:
        """Batches yielded so far, and what the place in the data depends on."""
        return {
            "yielded": self.yielded,
            "rollout_batches": self.plan.rollout_batches,
            "rollout_prompts": self.plan.rollout_prompts,
            "prompts": self.count,
            "seed": self.seed,
            "world_size": self.plan.world_size,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after as many batches; the data and the prompts of a rollout must be the same."""
        for key, now, what, settings in (
            ("prompts", self.count, "training prompts", "data.train.*"),
            ("rollout_prompts", self.plan.rollout_prompts, "prompts per rollout",
             "rollout.prompts_per_step x rollout.steps_per_rollout"),
        ):  # fmt: skip
            if state[key] != now:
                raise UserError(
                    "The checkpoint's place in the training data is lost",
                    got=f"{now} {what}",
                    expected=f"{state[key]}, as when the checkpoint was written",
                    do=f"leave {settings} as it was, or begin a new run from the exported weights",
                )
        if state["seed"] != self.seed:
            rank_zero_warn(
                f"The run continues with seed {self.seed} and began with seed {state['seed']}: in this epoch some "
                "prompts come twice and others not at all."
            )
        batches = self.plan.rollout_batches
        rollouts, rest = divmod(state["yielded"], state["rollout_batches"])
        self.yielded = rollouts * batches + (rest if state["rollout_batches"] == batches else 0)


class EvaluationLoader:
    """Yields one batch: every ``world_size``-th row of ``count``, starting at ``rank``.

    A process without problems gets an empty batch: where weights are sharded, all processes take part.
    """

    def __init__(self, count: int, rank: int, world_size: int) -> None:
        self.rows = list(range(count))[rank::world_size]

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[list[int]]:
        return iter([self.rows])
