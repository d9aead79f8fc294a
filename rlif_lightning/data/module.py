"""Prompts for training and evaluation: a LightningDataModule."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from rlif_lightning.data.batch_plan import BatchPlan
from rlif_lightning.data.loaders import EvaluationLoader, PromptLoader, run_seed
from rlif_lightning.data.problems import Source, read_problems
from rlif_lightning.data.prompts import Prompt, Template
from rlif_lightning.errors import UserError
from rlif_lightning.grading import AnswerFormat, check_gold


class PromptDataModule(pl.LightningDataModule):
    """Problems for training, validation, test and prediction.

    Args:
        train: Problems to train on; reference answers are optional.
        val: Held-out problems, evaluated during training and by ``rlif validate``.
        test: Problems of ``rlif test``.
        predict: Problems of ``rlif predict``; null: those of ``test``.
        answers: How an answer is found in a completion and compared, unless a source says that itself.
        template: How a problem becomes a prompt: a format string with ``{prompt}``, or ``chat`` for the chat
            template; null: the chat template if the tokenizer has one.
        system_prompt: System message for the chat template.
        chat_template: Jinja chat template that replaces the tokenizer's.
        chat_template_kwargs: Settings of the chat template, such as ``{enable_thinking: false}``.
        max_prompt_tokens: Longest training prompt in tokens; longer ones are left out and counted.
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
        chat_template_kwargs: dict[str, Any] | None = None,
        max_prompt_tokens: int = 512,
    ) -> None:
        super().__init__()
        self.sources = {"train": train, "val": val, "test": test, "predict": predict or test}
        answers = answers or AnswerFormat()
        own = {name: source.answers for name, source in self.sources.items() if source and source.answers}
        self._answers = {name: own[name].over(answers) if name in own else answers for name in self.sources}
        self.template = Template(template, system_prompt, chat_template, chat_template_kwargs or {})
        self.max_prompt_tokens = max_prompt_tokens
        self.tokenizer: Any = None  # where there is no Trainer
        self.plan: BatchPlan | None = None
        self.allow_zero_length_dataloader_with_multiple_devices = True  # fewer problems than processes
        self.prompts: dict[str, list[Prompt]] = {}

    def setup(self, stage: str) -> None:
        """Read and encode what the stage needs, before the model's weights are loaded."""
        if not self.prompts:
            self.template.check(self._tokenizer())
        fit = ["train", "val"] if self.sources["val"] else ["train"]
        for name in {"fit": fit, "validate": ["val"], "test": ["test"], "predict": ["predict"]}[stage]:
            if name not in self.prompts:
                self.prompts[name] = self._encode(name)

    def has_labels(self, name: str) -> bool:
        """Whether a source names a field of reference answers."""
        source = self.sources[name]
        return source is not None and source.answer is not None

    def answers_of(self, name: str) -> AnswerFormat:
        """How answers to a source's problems are read and compared."""
        return self._answers[name]

    def _tokenizer(self) -> Any:
        return self.tokenizer if self.trainer is None else self.trainer.lightning_module.tokenizer

    def _encode(self, name: str) -> list[Prompt]:
        source = self.sources[name]
        if source is None:
            raise UserError(f"data.{name} is empty, so this command has no problems", do=f"set data.{name}.path")
        tokenizer = self._tokenizer()
        problems = read_problems(source, "test" if source is self.sources["test"] else name)
        for problem in problems:
            if problem.gold is not None:
                check_gold(self.answers_of(name), problem.gold, problem.place)
        prompts = [self.template.encode(p, tokenizer) for p in problems]
        own = sum(self.template.keeps_system_message_of(p) for p in problems)
        if own:
            rank_zero_warn(
                f"{own} of {len(problems)} problems of {source.path} have a system message of their own, which takes "
                "the place of data.system_prompt; set data.system_prompt null if that is right."
            )
        return self._short_enough(prompts, source) if name == "train" else prompts

    def _short_enough(self, prompts: list[Prompt], source: Source) -> list[Prompt]:
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
        part = f", {source.split}" if "[" in source.split else ""  # a recipe's part may not be meant for this file
        rank_zero_info(f"Training prompts: {len(kept)} from {source.path}{part}")
        return kept

    def train_dataloader(self) -> PromptLoader:
        """Batches as the rollout callback planned them."""
        if self.plan is None:
            do = "give the Trainer a rlif_lightning.callbacks.RolloutCallback"
            raise UserError("Training needs a RolloutCallback", do=do)
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
