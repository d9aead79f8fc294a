"""Prompts for training and evaluation: a LightningDataModule and its resumable loader."""

import os
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from rlif_lightning.data.batch_plan import BatchPlan
from rlif_lightning.data.problems import Source, read_problems
from rlif_lightning.data.prompts import Prompt, Template
from rlif_lightning.errors import UserError
from rlif_lightning.grading import AnswerFormat, check_gold
from rlif_lightning.rollout import completion_seed


def run_seed() -> int:
    """The seed of the run, as ``seed_everything`` left it; 0 without one."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


class PromptLoader:
    """Yields the rows of each prompt batch once per slice of their rollout, and resumes exactly.

    Row numbers, not prompts: batches pass through Lightning, which looks into them for tensors.

    The order of prompts is a function of (seed, epoch), the same on one process and on many; each process
    takes its own part of every batch; the last incomplete batch of an epoch is dropped.

    Args:
        count: Prompts there are, the same on every process.
        plan: How many prompts a rollout takes and into how many batches it is cut.
        rank: This process.
        seed: Orders the prompts.

    Raises:
        UserError: Fewer prompts than one rollout needs.
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
        """Go on from where the loader stands to the end of the epoch."""
        epoch, start = divmod(self.yielded, len(self))
        order = torch.randperm(
            self.count, generator=torch.Generator().manual_seed(completion_seed(self.seed, epoch))
        ).tolist()
        for batch in range(start, len(self)):
            rollout, part = divmod(batch, self.plan.rollout_batches)
            first = rollout * self.plan.rollout_prompts + self.rank * self.plan.rank_prompts
            places = range(first, first + self.plan.rank_prompts)
            self.yielded += 1
            yield {
                "rows": [order[p] for p in places],
                "positions": [(epoch, p) for p in places],
                "slice": part,
            }

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
        """Go on after as many batches.

        Raises:
            UserError: The state is that of other data, or of rollouts with another number of prompts.
        """
        for key, setting in (("prompts", "data.train"), ("rollout_prompts", "rollout.prompts_per_step")):
            now = self.state_dict()[key]
            if state[key] != now:
                what = "training prompts" if key == "prompts" else "prompts per rollout"
                raise UserError(
                    "The checkpoint's place in the training data is lost",
                    got=f"{now} {what}",
                    expected=f"{state[key]}, as when the checkpoint was written",
                    do=f"leave {setting}.* as it was, or begin a new run from the exported weights"
                    if key == "prompts"
                    else f"leave {setting} x rollout.steps_per_rollout as it was",
                )
        if state["seed"] != self.seed:
            rank_zero_warn(
                f"The run goes on with seed {self.seed}, it began with {state['seed']}: within this epoch some "
                "prompts come twice and others not at all."
            )
        was, now = state["rollout_batches"], self.plan.rollout_batches
        rollouts, rest = divmod(state["yielded"], was)
        self.yielded = rollouts * now + (rest if was == now else 0)


class EvaluationLoader:
    """Yields one batch: the row numbers of this process, of which each takes every world-th.

    Args:
        count: Prompts there are.
        rank: This process.
        world_size: Processes. One without problems gets an empty batch: where weights are sharded, all take part.
    """

    def __init__(self, count: int, rank: int, world_size: int) -> None:
        self.rows = list(range(count))[rank::world_size]

    def __len__(self) -> int:
        """One."""
        return 1

    def __iter__(self) -> Iterator[list[int]]:
        """The batch."""
        return iter([self.rows])


class PromptDataModule(pl.LightningDataModule):
    """Problems for training, validation, test and prediction.

    Args:
        train: Problems to train on; answers are optional.
        val: Held-out problems, evaluated while training and by ``rlif validate``.
        test: Problems of ``rlif test``.
        predict: Problems of ``rlif predict``; null: those of ``test``.
        answers: How an answer is read from a completion and compared.
        template: A format string with ``{prompt}``; ``chat``; null: the chat template where there is one.
        system_prompt: System message of the chat template.
        chat_template: A Jinja chat template in place of the tokenizer's.
        max_prompt_tokens: Longer training prompts are left out, and counted.
    """

    def __init__(
        self,
        train: Source | None = None,
        val: Source | None = None,
        test: Source | None = None,
        predict: Source | None = None,
        answers: AnswerFormat | None = None,
        template: str | None = None,
        system_prompt: str | None = None,
        chat_template: str | None = None,
        max_prompt_tokens: int = 512,
    ) -> None:
        super().__init__()
        self.sources = {"train": train, "val": val, "test": test, "predict": predict or test}
        self.answers = answers or AnswerFormat()
        self.template = Template(template, system_prompt, chat_template)
        self.max_prompt_tokens = max_prompt_tokens
        self.tokenizer: Any = None  # where there is no Trainer
        self.plan: BatchPlan | None = None
        self.allow_zero_length_dataloader_with_multiple_devices = True  # fewer problems than processes
        self.prompts: dict[str, list[Prompt]] = {}

    def setup(self, stage: str) -> None:
        """Read and encode what the stage needs, before the model's weights are loaded."""
        needed = {
            "fit": ["train"] + (["val"] if self.sources["val"] else []),
            "validate": ["val"],
            "test": ["test"],
            "predict": ["predict"],
        }[stage]
        for name in needed:
            if name not in self.prompts:
                self.prompts[name] = self._encode(name)

    def has_labels(self, name: str) -> bool:
        """Whether a source names a field of reference answers."""
        source = self.sources[name]
        return source is not None and source.answer is not None

    def _encode(self, name: str) -> list[Prompt]:
        source = self.sources[name]
        if source is None:
            raise UserError(
                f"No problems are given for this command: data.{name} is empty", do=f"set data.{name}.path"
            )
        tokenizer: Any = self.tokenizer if self.trainer is None else self.trainer.lightning_module.tokenizer
        problems = read_problems(source, held_out=name != "train")
        for number, problem in enumerate(problems, 1):
            if problem.gold is not None:
                check_gold(self.answers, problem.gold, f"Row {number} of {source.path}")
        prompts = [self.template.encode(p, tokenizer) for p in problems]
        if name != "train":
            return prompts
        kept = [p for p in prompts if len(p.ids) <= self.max_prompt_tokens]
        if not kept:
            raise UserError(
                "Every prompt is longer than data.max_prompt_tokens",
                got=f"{min(len(p.ids) for p in prompts)} tokens in the shortest of {len(prompts)}",
                expected=f"at most {self.max_prompt_tokens}",
                do="raise --data.max_prompt_tokens",
            )
        if len(kept) < len(prompts):
            rank_zero_warn(
                f"{len(prompts) - len(kept)} of {len(prompts)} training prompts are longer than "
                f"data.max_prompt_tokens={self.max_prompt_tokens} and are left out."
            )
        rank_zero_info(f"Training prompts: {len(kept)} from {source.path}")
        return kept

    def train_dataloader(self) -> PromptLoader:
        """Batches as the rollout callback planned them."""
        if self.plan is None:
            raise UserError(
                "Nothing collects rollouts",
                do="give the Trainer a rlif_lightning.callbacks.RolloutCallback",
            )
        assert self.trainer is not None
        limit = self.trainer.limit_train_batches
        if limit % self.plan.rollout_batches if isinstance(limit, int) else limit != 1:
            raise UserError(
                "An epoch would end in the middle of a rollout",
                got=f"{limit} batches (trainer.limit_train_batches, overfit_batches or fast_dev_run)",
                expected=f"a multiple of {self.plan.rollout_batches}, the batches of a rollout",
                do="set trainer.max_steps or data.train.limit instead",
            )
        return PromptLoader(len(self.prompts["train"]), self.plan, self.trainer.global_rank, run_seed())

    def evaluation_loader(self, name: str, limit: int | None = None) -> EvaluationLoader:
        """This process's part of a source's problems, or of the first of them."""
        assert self.trainer is not None
        return EvaluationLoader(len(self.prompts[name][:limit]), self.trainer.global_rank, self.trainer.world_size)

    def val_dataloader(self) -> EvaluationLoader | list[Any]:
        """Validation prompts; while fitting the Evaluation callback takes them itself."""
        assert self.trainer is not None
        return [] if self.trainer.state.fn == TrainerFn.FITTING else self.evaluation_loader("val")

    def test_dataloader(self) -> EvaluationLoader:
        """Test prompts."""
        return self.evaluation_loader("test")

    def predict_dataloader(self) -> EvaluationLoader:
        """Prompts to complete."""
        return self.evaluation_loader("predict")

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Prompts stay lists; tensors are made where they are needed."""
        return batch
