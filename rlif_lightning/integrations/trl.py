"""The rewards and the collapse guard inside TRL's GRPOTrainer. TRL itself is not imported."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from transformers import TrainerCallback

from rlif_lightning.errors import UserError
from rlif_lightning.functional.seeds import completion_seeds
from rlif_lightning.functional.similarity import group_similarity
from rlif_lightning.grading import ROLLOUT_SECONDS, AnswerFormat, Grader, agreement
from rlif_lightning.guard.kept_weights import KeptWeights
from rlif_lightning.guard.rule import AGREEMENT, REFERENCE, SIMILARITY, CollapseRule, RuleSettings, default_rule
from rlif_lightning.integrations.scores import Text, check_forward, samples_of, stats_of
from rlif_lightning.models.references import ANNOTATORS, References
from rlif_lightning.models.trainable import put_weights
from rlif_lightning.rewards import Reward
from rlif_lightning.rollout import Rollout


class InternalReward(TrainerCallback):
    """A reward of this package as TRL's reward function, by the model in training, and the callback that finds it.

    ``GRPOTrainer(model, reward_funcs=(r := InternalReward(SelfCertainty())), callbacks=[r], ...)``. The distributions
    are those that TRL samples from, at GRPOConfig's temperature; top_p, top_k and min_p do not enter. Takes one
    forward per rollout, and one per reference. Logs the guard's signals: similarity; agreement where answers are
    read; start_logprob where the annotator is ``reference``.

    Args:
        reward: Any that needs neither labels nor the answer's tokens. Its weight is GRPOConfig's ``reward_weights``.
            The annotators ``reference`` and ``ema`` begin as copies of the trainer's model.
        answers: Where answers stand, for rewards that compare them, and for the guard.

    Raises:
        UserError: The reward requires what TRL does not have, or answers.
    """

    def __init__(self, reward: Reward, answers: AnswerFormat | None = None) -> None:
        lacking = reward.requires - {*ANNOTATORS.values()} - ({"answers"} if answers else set())
        if lacking:
            do = "give answers=AnswerFormat(...)" if lacking == {"answers"} else "choose another reward"
            raise UserError(f"The reward {reward.class_path} lacks something here", got=", ".join(lacking), do=do)
        self.reward, self.__name__ = reward, reward.name
        self.grader = None if answers is None else Grader(answers, budget=ROLLOUT_SECONDS)
        self.model: Any = None
        self.references = References()

    def on_init_end(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        """Take the trainer's model and tokenizer, and copy what the reward refers to."""
        _refuse_shares(args)
        self.args, self.checked = args, False
        self.model, self.tokenizer = trainer["model"], trainer["processing_class"]
        kinds = [kind for kind, name in ANNOTATORS.items() if name in self.reward.requires]
        self.references = References()
        self.references.create(kinds, self.model, self.model.dtype, self.model.device)

    def on_step_end(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        """Let the running mean follow."""
        self.references.update_after_step(self.model, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        """End the processes that compare answers."""
        if self.grader is not None:
            self.grader.close()

    def __call__(
        self, prompts: Sequence[Text], completions: Any, completion_ids: Sequence[Sequence[int]], **columns: Any
    ) -> list[float]:
        """Rewards [N] of TRL's rollout, NaN where the reward abstains."""
        if self.model is None:
            raise UserError(f"The reward {self.__name__} knows no model", do="name it among the callbacks as well")
        rollout = self._rollout(prompts, completions, completion_ids, columns["trainer_state"].global_step)
        for name, value in self._signals(rollout):
            columns["log_metric"](name, value)
        return [float(x) for x in self.reward(rollout)]

    def _rollout(self, prompts: Any, completions: Any, completion_ids: Any, step: int) -> Rollout:
        args, group = self.args, self.args.num_generations
        if not self.model.training:  # TRL evaluates
            group = args.num_generations_eval or group
        template = args.chat_template_kwargs or {}
        samples = samples_of(self.model, self.tokenizer, prompts, completion_ids, **template)
        if not self.checked:
            check_forward(self.model, samples)
            self.checked = True
        how = (args.temperature, self.reward.statistics, args.per_device_train_batch_size)
        stats, annotations = stats_of(self.model, samples, *how), {}
        for kind, name in ANNOTATORS.items():
            if name in self.reward.requires:
                with self.references.using(kind, self.model) as model:
                    annotations[name] = stats_of(model, samples, *how)
        samples = replace(samples, logprob=stats.logprob, stats=stats)
        texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
        seeds = completion_seeds(args.seed, [(step, args.process_index, row) for row in range(len(texts))], 1)
        rollout = Rollout(samples, group, args.temperature, seeds, texts, annotations=annotations)
        return rollout if self.grader is None else self._with_answers(rollout, self.grader)

    def _with_answers(self, rollout: Rollout, grader: Grader) -> Rollout:
        group = rollout.group_size
        if len(rollout.texts) % group:
            do = "make per_device_train_batch_size a multiple of num_generations"
            raise UserError("The answers of a group lie on several processes", do=do)
        grader.begin()
        answers = grader.extract_answers(list(zip(rollout.texts, rollout.samples.ended.tolist(), strict=True)))
        votes = [grader.classes(answers[i : i + group]) for i in range(0, len(answers), group)]
        return replace(rollout, answers=answers, votes=votes)

    def _signals(self, rollout: Rollout) -> Iterator[tuple[str, float]]:
        """The guard's signals that this rollout has."""
        mask, group = rollout.samples.completion_mask, rollout.group_size
        if len(mask) % group == 0 and group > 1:
            yield SIMILARITY, float(group_similarity(rollout.samples.completion_ids, mask, group).mean())
        if any(answer is not None for answer in rollout.answers):
            yield AGREEMENT, sum(map(agreement, rollout.votes)) / len(rollout.votes)
        if "reference" in rollout.annotations:
            yield REFERENCE, float(rollout.annotations["reference"].logprob[mask].mean())


class GuardCallback(TrainerCallback):
    """The collapse guard: notices from TRL's logs, without labels, that training has turned, and goes back.

    Its signals are what an :class:`InternalReward` logs. The trainable weights of the best step are kept in the CPU's
    memory, and written to ``guard/weights.safetensors`` in the output folder when it has fired, with each checkpoint
    and at the end. A resume begins its history anew.

    Args:
        action: What to do when a collapse has begun. ``warn``: warn and train on. ``stop``: end the training.
            ``restore``: end it with the best weights in the model.
        settings: Of the rule; see docs/guard.md.
    """

    rule: CollapseRule
    kept: KeptWeights

    def __init__(
        self, action: Literal["warn", "stop", "restore"] = "restore", settings: RuleSettings | None = None
    ) -> None:
        self.action, self.settings, self.step = action, settings or RuleSettings(), 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        """Begin anew; refuse logs that do not show each rollout."""
        _refuse_shares(args)
        if args.logging_strategy != "steps" or args.logging_steps != 1:
            got = f"logging_strategy {args.logging_strategy}, logging_steps {args.logging_steps}"
            raise UserError("The guard needs the log of each rollout", got=got, do="set logging_steps=1")
        self.rule, self.kept = default_rule(settings=self.settings), KeptWeights()

    def on_step_begin(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        """Copy the weights that the next rollout comes from: its log arrives after their update."""
        self.step = state.global_step
        if state.is_world_process_zero and self.rule.fired is None:
            self.kept.keep(self.rule.needed_steps | {self.step}, self.step, trainer["model"])

    def on_log(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        """Judge a rollout."""
        logs = trainer["logs"]
        values = {w.signal: logs[w.signal] for w in self.rule.watches if logs.get(w.signal) is not None}
        if not values:
            if "reward" in logs and not self.rule.steps:
                do = "name an InternalReward in reward_funcs and callbacks"
                raise UserError("The guard finds none of its signals in the logs", do=do)
            return
        decision = self.rule.update(self.step, values)
        if decision.verdict == "fired":
            kept = f"The weights of step {decision.best_step} are kept"
            warnings.warn(f"Collapse guard ({self.action}): {decision.reason}. {kept}.", stacklevel=2)
            control.should_training_stop = self.action != "warn"
            self.on_save(args, state, control, **trainer)

    def on_save(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        """Bring the weights that would be handed back to the disk."""
        if state.is_world_process_zero:
            self.kept.keep(self.rule.needed_steps, -1, trainer["model"])
            self.kept.write(Path(args.output_dir) / "guard", self.rule.best_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        """Write, and restore where that was decided."""
        self.on_save(args, state, control, **trainer)
        if self.rule.fired is not None and self.action == "restore":
            put_weights(trainer["model"], self.kept.steps.get(self.rule.fired.best_step))


def _refuse_shares(args: Any) -> None:
    """Refuse processes that share the weights out: the model in hand would have parts of them only."""
    kind = args.distributed_state.distributed_type.name
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "TP"):
        raise UserError("Rewards and guard need whole weights", got=kind, do="use one process, or DDP")
