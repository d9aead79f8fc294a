"""The callback that feeds training: a rollout from the present policy before each group of updates."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from rlif_lightning.callbacks.logging import all_values, clock, log_now, peak_memory_mb
from rlif_lightning.callbacks.progress import sampling_progress
from rlif_lightning.callbacks.rollout_metrics import rollout_metrics
from rlif_lightning.callbacks.sampling import check_sampler, ready
from rlif_lightning.data.batch_plan import BatchPlan
from rlif_lightning.data.module import PromptDataModule, run_seed
from rlif_lightning.errors import UserError
from rlif_lightning.functional.advantages import Baseline, Scale
from rlif_lightning.functional.entropy import top_entropy_mask
from rlif_lightning.functional.losses import loss_denominator
from rlif_lightning.grading import Grader
from rlif_lightning.models.references import ReferenceKind
from rlif_lightning.rewards import Reward, SelfCertainty
from rlif_lightning.rewards.base import statistics_of
from rlif_lightning.rollout import Rollout, completion_seed
from rlif_lightning.sampling import NativeSampler, Sampler, Sampling, VLLMSampler
from rlif_lightning.training.collector import (
    AdvantageSettings,
    sample_rollout,
    score_slices,
    with_advantages,
    with_importance,
    with_scores,
)
from rlif_lightning.training.module import RLIFModule

ANNOTATORS: dict[str, ReferenceKind] = {"reference": "frozen", "ema": "ema"}
"""What a reward may require, and the version of the policy that it is."""
ENGINE_KL = 0.1
"""Nats per token between engine and policy from which on the engine computes something else than the policy."""


class RolloutCallback(Callback):
    """Collects a rollout with the present policy, rewards it, and hands it to the updates slice by slice.

    Args:
        prompts_per_step: Prompts of one optimiser step, over all processes.
        group_size: Completions per prompt.
        micro_batch_size: Completions in one forward and backward of one process; null: all of a step at once.
        passes: Optimisation passes over one rollout.
        steps_per_rollout: Optimiser steps in one pass over one rollout.
        max_new_tokens: Longest completion.
        temperature: Of the sampler; log-probabilities are those of softmax(logits / temperature).
        top_k: Sample among the k most likely tokens; 0: all.
        top_p: Sample among the most likely tokens that reach this probability; 1: all.
        min_p: Leave out tokens less likely than this share of the most likely one; 0: none.
        statistics_temperature: Temperature of the statistics that are rewarded: ``sampling``, or a number.
        rewards: A reward, or a list: several are standardised in the group, weighted and summed.
        votes: Completions per prompt whose answers count for rewards of answers and for ``agreement_band``; more
            than ``group_size`` are sampled for that alone. null: the group.
        scale: Divide advantages by the standard deviation of the ``group``, of the whole rollout (``batch``), or
            by nothing (``none``).
        baseline: What a reward is compared with: the ``mean`` of its group, or that of the others
            (``leave_one_out``).
        min_spread: Groups whose rewards have no larger standard deviation than this (in the reward's unit, nats
            for the internal ones) teach nothing.
        mask_truncated: Leave completions without an end out of statistics and loss.
        agreement_band: Keep prompts whose agreement lies in ``[low, high]``, the others are left out of the
            loss; null: all.
        sampler: The engine.
        importance_cap: Where the engine is not the policy itself (VLLMSampler), a token's surrogate is multiplied by
            min(policy / engine, this cap), by the probabilities that the two gave it when it was sampled; null: off.
    """

    def __init__(
        self,
        prompts_per_step: int = 16,
        group_size: int = 8,
        micro_batch_size: int | None = None,
        passes: int = 1,
        steps_per_rollout: int = 1,
        max_new_tokens: int = 512,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        statistics_temperature: float | Literal["sampling"] = "sampling",
        rewards: list[Reward] | Reward | None = None,
        votes: int | None = None,
        scale: Scale = "group",
        baseline: Baseline = "mean",
        min_spread: float = 1e-4,
        mask_truncated: bool = False,
        agreement_band: tuple[float, float] | None = None,
        sampler: Sampler | None = None,
        importance_cap: float | None = 2.0,
    ) -> None:
        if temperature <= 0:
            raise UserError(
                "Training samples its completions, so the temperature must be above 0: at 0 every group "
                "holds one completion many times and teaches nothing",
                got=f"rollout.temperature {temperature}",
                do="set --rollout.temperature 1.0",
            )
        self.sizes = (prompts_per_step, group_size, micro_batch_size, passes, steps_per_rollout)
        BatchPlan(*self.sizes)  # refuses what can't work on one process either
        self.sampling = Sampling(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            statistics_temperature=None if statistics_temperature == "sampling" else statistics_temperature,
        )
        if rewards is not None and not rewards:
            raise UserError("rollout.rewards is empty", expected="at least one reward; null: SelfCertainty")
        self.rewards: Sequence[Reward] = [rewards] if isinstance(rewards, Reward) else rewards or [SelfCertainty()]
        names = [r.name for r in self.rewards]
        if len(set(names)) < len(names):
            raise UserError(
                "A reward is named twice",
                got=", ".join(names),
                do="keep one of them: --rollout.rewards+ adds to the recipe's, --rollout.rewards replaces them",
            )
        if all(r.is_silent for r in self.rewards):
            raise UserError("Every reward has weight 0, so nothing would be learned", got=", ".join(names))
        if votes is not None and votes < group_size:
            raise UserError(
                "rollout.votes is smaller than the group", got=votes, expected=f"{group_size} (group_size) or more"
            )
        self.votes = votes
        self.sampling = replace(self.sampling, statistics=statistics_of(self.rewards))
        if min_spread < 0:
            raise UserError("rollout.min_spread is negative", got=min_spread, expected="0 or more")
        if agreement_band is not None and not 0 <= agreement_band[0] <= agreement_band[1] <= 1:
            raise UserError("rollout.agreement_band is no band", got=agreement_band, expected="0 <= low <= high <= 1")
        self.advantage = AdvantageSettings(scale, baseline, min_spread, mask_truncated, agreement_band)
        if importance_cap is not None and importance_cap < 1:
            raise UserError(
                "rollout.importance_cap is too small",
                got=importance_cap,
                expected="1 or more, or null for no weights",
            )
        self.importance_cap = importance_cap
        self.sampler: Sampler = sampler or NativeSampler()
        self.plan = BatchPlan(*self.sizes)
        self.rollout: Rollout | None = None
        """The present rollout of this process; None between two rollouts."""
        self._grader: Grader | None = None
        self._annotators: list[str] = []
        self._needs_answers = self._checked = False
        self._slices: list[Tensor] = []
        self._denominators: list[float] = []
        self._update_start = 0.0

    # -- hooks -----------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Derive the batch arithmetic and check that the rewards find what they need."""
        if stage != "fit":
            return
        datamodule = _datamodule(trainer)
        assert isinstance(pl_module, RLIFModule)
        check_sampler(self.sampler, trainer, self.sampling, datamodule.prompts["train"])
        if trainer.accumulate_grad_batches != 1:
            raise UserError(
                "trainer.accumulate_grad_batches is derived from the rollout's sizes",
                got=trainer.accumulate_grad_batches,
                do="set --rollout.micro_batch_size instead",
            )
        self.plan = BatchPlan(*self.sizes, world_size=trainer.world_size)
        if trainer.max_steps > 0 and trainer.max_steps % self.plan.rollout_steps:
            raise UserError(
                "trainer.max_steps would end in the middle of a rollout",
                got=f"{trainer.max_steps} steps, {self.plan.rollout_steps} steps per rollout",
                expected=f"a multiple of {self.plan.rollout_steps}",
            )
        trainer.accumulate_grad_batches = self.plan.slices
        datamodule.plan = self.plan
        datamodule.train_dataloader()  # refuses too few prompts before the weights are loaded
        needs = frozenset().union(*(r.requires for r in self.rewards))
        if "labels" in needs and not datamodule.has_labels("train"):
            names = ", ".join(r.name for r in self.rewards if "labels" in r.requires)
            raise UserError(
                f"The reward {names} compares answers, and the training data has none",
                do="name the answer's field in --data.train.answer, or choose an internal reward",
            )
        pl_module.needs.update(ANNOTATORS[a] for a in needs & ANNOTATORS.keys())
        self._annotators = sorted(needs & ANNOTATORS.keys())
        self._needs_answers = "answers" in needs or self.advantage.agreement_band is not None
        if self.votes is not None and not self._needs_answers:
            raise UserError(
                "rollout.votes samples completions whose votes nothing counts",
                got=f"rollout.votes {self.votes}; rewards {', '.join(r.name for r in self.rewards)}",
                do="leave it out, or reward with MajorityVote or ClusterFrequency, or set rollout.agreement_band",
            )
        self._grader = Grader(datamodule.answers)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """End the grader's worker."""
        if self._grader is not None:
            self._grader.close()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what is about to happen."""
        steps = pl_module.total_steps() if isinstance(pl_module, RLIFModule) else trainer.max_steps
        tokens = steps // self.plan.rollout_steps * self.plan.rollout_prompts * (self.votes or self.plan.group_size)
        tokens *= self.sampling.max_new_tokens
        rank_zero_info(
            f"Plan: {self.plan.describe()}; {steps} steps, at most {tokens:,} sampled tokens. "
            "On policy the loss is near 0 by construction: watch reward, entropy and accuracy instead."
        )
        if self.sampling.filtered:
            told = ""
            if isinstance(self.sampler, NativeSampler):
                told = "rollout/kept_mass logs how much of it the filter keeps."
            elif isinstance(self.sampler, VLLMSampler):
                told = "The mismatch between vLLM and the policy is then neither measured nor corrected."
            rank_zero_warn(
                "top_k, top_p or min_p is set: completions come from the filtered distribution, while "
                "log-probabilities, entropy and self-certainty describe the unfiltered softmax(logits / "
                f"temperature). {told}"
            )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: dict[str, Any], batch_idx: int
    ) -> None:
        """Collect at the first slice of a rollout; put this batch's slice into the batch."""
        assert isinstance(pl_module, RLIFModule)
        prompts = _datamodule(trainer).prompts["train"]
        batch["prompts"] = [prompts[row] for row in batch["rows"]]
        if batch["slice"] == 0 or self.rollout is None:
            if batch["slice"]:
                rank_zero_warn("Resumed from the middle of a rollout: it is sampled anew with the present weights.")
            self._collect(trainer, pl_module, batch)
        assert self.rollout is not None
        if batch["slice"] % self.plan.slices == 0 and pl_module.top_entropy_fraction < 1:
            self.rollout = self._with_surrogate_mask(trainer, batch["slice"], pl_module.top_entropy_fraction)
        rows = self._slices[batch["slice"]]
        part = self.rollout.slice(rows)
        batch["rollout"] = part
        batch["old_logprob"] = None if self.plan.on_policy else part.samples.logprob
        batch["denominator"] = self._denominators[batch["slice"] // self.plan.slices]
        if batch["slice"] % self.plan.slices == 0:
            self._update_start = clock(pl_module)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: dict[str, Any],
        batch_idx: int,
    ) -> None:
        """Log a finished optimiser step; let go of a finished rollout."""
        assert isinstance(pl_module, RLIFModule)
        if (batch["slice"] + 1) % self.plan.slices == 0:
            metrics = pl_module.window_metrics()
            metrics["time/update"] = clock(pl_module) - self._update_start
            # These numbers belong to the step that was just taken: global_step has already moved on.
            log_now(trainer, metrics, step=trainer.global_step - 1)
        if batch["slice"] + 1 == self.plan.rollout_batches:
            self.rollout = None

    @property
    def at_boundary(self) -> bool:
        """Whether no rollout is half used: the only moments at which a checkpoint can be resumed exactly."""
        return self.rollout is None

    # -- collecting ------------------------------------------------------------------------------------------

    def _collect(self, trainer: Trainer, module: RLIFModule, batch: dict[str, Any]) -> None:
        start = clock(module)
        assert module.policy is not None
        with ready(self.sampler, trainer, module) as policy:
            rollout = sample_rollout(
                self.sampler,
                batch["prompts"],
                batch["positions"],
                run_seed(),
                self.plan.group_size,
                self.sampling,
                module.decode,
                self._grader,
                sampling_progress(trainer),
                self.votes,
            )
            windows = self.plan.cut(rollout.samples.lengths.cpu(), self._dealer(batch["positions"][0]))
            first_pass = [rows for w in windows[: self.plan.steps_per_rollout] for rows in w]
            rollout = with_scores(rollout, policy, self.sampling, first_pass, module.plain_forward, module.one_pass)
            rollout = with_importance(rollout, self.importance_cap)
            sampled = clock(module)
            rollout = self._with_versions(rollout, module, first_pass)
            referred = clock(module)
            weights = [r.weight_at(trainer.global_step) for r in self.rewards]
            total = partial(trainer.strategy.reduce, reduce_op="sum")
            weighed = with_advantages(rollout, self.rewards, weights, self.advantage, total)
            rollout = weighed.rollout
        self.rollout = rollout
        self._slices = [rows for window in windows for rows in window]
        self._denominators = self._window_denominators(trainer, module, rollout, windows)
        metrics = rollout_metrics(trainer, weighed, weights, sampled - start)
        self._checked |= trainer.global_step > 0  # a continued run has shown before that its rewards can work
        self._check_first(metrics)
        metrics["time/rollout"] = sampled - start
        if module.needs:
            metrics["time/reference"] = referred - sampled
        metrics["memory/peak"] = peak_memory_mb(module)
        log_now(trainer, metrics)

    def _with_versions(self, rollout: Rollout, module: RLIFModule, slices: list[Tensor]) -> Rollout:
        """Score the rollout under other versions of the policy: for the KL term, and for rewards of theirs."""
        for which in sorted(module.needs):
            names = [a for a in self._annotators if ANNOTATORS[a] == which]
            with module.version(which) as model:
                logprob, stats = score_slices(
                    model, rollout, slices, self.sampling, bool(names), module.plain_forward, module.one_pass
                )
            if stats is not None:
                rollout = replace(rollout, annotations={**rollout.annotations, **dict.fromkeys(names, stats)})
            if which == "frozen":
                rollout = replace(rollout, start_logprob=logprob)
            if which == module.reference:
                rollout = replace(rollout, kl_logprob=logprob)
        return rollout

    def _check_first(self, metrics: dict[str, float]) -> None:
        """Refuse, before the first update, rewards that can't work on this data.

        Raises:
            UserError: The engine is not the policy; answers are needed and not one completion has one; or the rewards
                cancel.
        """
        if self._checked:
            return
        self._checked = True
        if metrics.get("rollout/engine_kl", 0.0) > ENGINE_KL:
            raise UserError(
                "The engine of rollout.sampler computes something else than the policy",
                got=f"{metrics['rollout/engine_kl']:.3g} nats per token between them",
                expected=f"at most {ENGINE_KL}; below 0.01 in bfloat16, near 0 in float32",
                do="leave rollout.sampler out",
            )
        if self._needs_answers and not metrics.get("rollout/answered_fraction"):
            names = [r.name for r in self.rewards if "answers" in r.requires] or ["agreement_band"]
            raise UserError(
                f"{', '.join(names)} compares answers, and none of the first completions has one",
                do="say in --data.answers.completion where answers stand, or choose another reward",
            )
        if metrics["rollout/advantage_size"] < 1e-6 and metrics["rollout/gated_fraction"] < 1:
            raise UserError(
                "The rewards cancel: their weighted advantages sum to 0 for every completion",
                got=", ".join(f"{r.name}" for r in self.rewards),
                do="change --rollout.rewards or their weights",
            )

    def _with_surrogate_mask(self, trainer: Trainer, first_slice: int, fraction: float) -> Rollout:
        """Choose the tokens that learn among those of the window that begins; another pass deals other windows."""
        rollout = self.rollout
        assert rollout is not None and rollout.loss_mask is not None
        rows = torch.cat(self._slices[first_slice : first_slice + self.plan.slices]).to(rollout.loss_mask.device)
        window = torch.zeros_like(rollout.loss_mask)
        window[rows] = rollout.loss_mask[rows]
        entropy = rollout.statistics().entropy
        mask = top_entropy_mask(entropy, window, fraction, partial(all_values, trainer))
        return replace(rollout, surrogate_mask=mask)

    def _dealer(self, first: tuple[int, ...]) -> torch.Generator:
        """Deals this rollout's groups into windows: the same again after a resume."""
        return torch.Generator().manual_seed(completion_seed(run_seed(), *first, -1))

    def _window_denominators(
        self, trainer: Trainer, module: RLIFModule, rollout: Rollout, windows: list[list[Tensor]]
    ) -> list[float]:
        """What the token losses of each window are divided by, over all its slices and processes."""
        mask = rollout.loss_mask
        assert mask is not None
        own = [
            sum(loss_denominator(mask[rows], module.loss, self.sampling.max_new_tokens) for rows in window)
            for window in windows
        ]
        total = trainer.strategy.reduce(torch.stack([torch.as_tensor(x) for x in own]).float(), reduce_op="sum")
        assert isinstance(total, Tensor)
        return total.clamp(min=1).tolist()


def _datamodule(trainer: Trainer) -> PromptDataModule:
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(datamodule, PromptDataModule):
        raise UserError("Training takes its prompts from a PromptDataModule", got=type(datamodule).__name__)
    return datamodule
