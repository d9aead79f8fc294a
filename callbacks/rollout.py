"""The callback that feeds training: a rollout from the current policy before each group of updates."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from rlif_lightning.callbacks.completions import append_rows, completion_row
from rlif_lightning.callbacks.logging import gather_objects, log_now, peak_memory, rollout_metrics, run_logger
from rlif_lightning.callbacks.progress import say_above_bar
from rlif_lightning.data.batch_plan import BatchPlan
from rlif_lightning.data.limits import check_prompts
from rlif_lightning.data.loaders import run_seed
from rlif_lightning.data.module import PromptDataModule
from rlif_lightning.errors import UserError, check_ranges
from rlif_lightning.functional.advantages import Baseline, Scale
from rlif_lightning.functional.entropy import top_entropy_mask
from rlif_lightning.models.stop_strings import check_stop
from rlif_lightning.rewards import Reward, SelfCertainty
from rlif_lightning.rollout import Rollout
from rlif_lightning.runs.folder import SKIPPED
from rlif_lightning.sampling import NativeSampler, Sampler, Sampling, VLLMSampler
from rlif_lightning.training.collector import Collected, Collector
from rlif_lightning.training.cut_off import mostly_cut_off
from rlif_lightning.training.learning_check import LearningCheck
from rlif_lightning.training.module import RLIFModule
from rlif_lightning.training.rewarding import AdvantageSettings

SKIPPED_STEPS = 10  # skipped steps of a run whose completions are kept


class RolloutCallback(Callback):
    r"""Collects a rollout with the current policy, rewards it, and hands it to the updates in slices.

    Args:
        prompts_per_step: Prompts of one optimiser step, over all processes.
        group_size: Completions per prompt.
        micro_batch_size: Completions in one forward and backward pass of one process; null: all of a step at once.
        passes: Optimisation passes over one rollout.
        steps_per_rollout: Optimiser steps in one pass over a rollout.
        max_new_tokens: Longest completion in tokens.
        stop: Texts that end a completion, such as ``["\nQuestion:"]``, also in evaluations and exports. A completion
            ends with the token that completes one, and its text ends with the stop string. null: only tokens end it.
        temperature: Sampling temperature; log-probabilities are those of softmax(logits / temperature).
        top_k: Sample among the k most likely tokens; 0: among all.
        top_p: Sample among the most likely tokens that together reach this probability; 1: among all.
        min_p: Leave out tokens that are less likely than this share of the most likely one; 0: leave out none.
        statistics_temperature: Temperature of the distributions that internal rewards read: ``sampling`` for that of
            the sampler, or a number.
        rewards: Rewards by class path. The advantages of several are standardised within the group, weighted and
            added up. null: SelfCertainty.
        votes: Completions per prompt whose answers are counted by rewards on answers and by ``agreement_band``; those
            beyond ``group_size`` are sampled for the count only. null: the group.
        scale: What advantages are divided by: the standard deviation of the ``group``, that of the whole rollout
            (``batch``), or nothing (``none``).
        baseline: What is subtracted from a reward: the ``mean`` of its group, or the mean of the others in it
            (``leave_one_out``).
        min_spread: Smallest standard deviation of a group's rewards, in the reward's unit (nats for the internal
            ones); a group at or below it teaches nothing.
        mask_truncated: Leave completions that were cut off out of the statistics and the loss.
        agreement_band: Keep the prompts whose agreement lies in ``[low, high]`` and leave the others out of the loss;
            null: keep all.
        sampler: Class that samples; null: NativeSampler.
        importance_cap: Correct for a sampler that is not the policy itself (VLLMSampler): a token's surrogate is
            multiplied by min(policy / sampler, cap), the ratio of the probabilities that the two gave it when it was
            sampled. null: no correction.
    """

    def __init__(
        self,
        prompts_per_step: int = 16,
        group_size: int = 8,
        micro_batch_size: int | None = None,
        passes: int = 1,
        steps_per_rollout: int = 1,
        max_new_tokens: int = 512,
        stop: list[str] | None = None,
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
        why = "above 0, such as 1.0: at 0 every group holds one completion many times and teaches nothing"
        check_ranges("rollout", ("temperature", temperature, temperature > 0, why))
        self.stop = check_stop(stop)
        statistics = None if statistics_temperature == "sampling" else statistics_temperature
        self.collector = Collector(
            sampler or NativeSampler(),
            Sampling(max_new_tokens, temperature, top_k, top_p, min_p, statistics),
            [rewards] if isinstance(rewards, Reward) else [SelfCertainty()] if rewards is None else rewards,
            BatchPlan(prompts_per_step, group_size, micro_batch_size, passes, steps_per_rollout),
            AdvantageSettings(scale, baseline, min_spread, mask_truncated, agreement_band),
            votes,
            importance_cap,
        )
        self._collected: Collected | None = None  # of this process; None between two rollouts
        self._rollout: Rollout | None = None  # with the tokens that learn in the current optimiser step
        self._update_start = 0.0
        self._check = LearningCheck(self.collector.advantages, any(r.abstains for r in self.collector.rewards))

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Derive the batch arithmetic and check that the rewards find what they need."""
        collector = pl_module.collector = self.collector
        pl_module.policy_settings = replace(pl_module.policy_settings, stop=self.stop)
        if stage != "fit":
            return
        if [c for c in trainer.callbacks if isinstance(c, RolloutCallback)] != [self]:
            raise UserError("The Trainer has more than one RolloutCallback", do="give it one, with all rewards")
        data = trainer.datamodule
        if not isinstance(data, PromptDataModule):
            raise UserError("Training takes its prompts from a PromptDataModule", got=type(data).__name__)
        check_prompts(data.prompts["train"], "rollout", pl_module, collector.sampler, collector.sampling)
        if trainer.accumulate_grad_batches != 1:
            wrong = "trainer.accumulate_grad_batches is derived from the rollout's sizes"
            raise UserError(wrong, got=trainer.accumulate_grad_batches, do="set --rollout.micro_batch_size instead")
        collector.open(trainer.world_size, data.answers_of("train"), data.has_labels("train"))
        plan = collector.plan
        if trainer.max_steps > 0 and trainer.max_steps % plan.rollout_steps:
            raise UserError(
                "trainer.max_steps would end in the middle of a rollout",
                got=f"{trainer.max_steps} steps, {plan.rollout_steps} steps per rollout",
                expected=f"a multiple of {plan.rollout_steps}",
            )
        trainer.accumulate_grad_batches = plan.slices
        data.plan = plan
        data.train_dataloader()  # refuses too few prompts before the weights are loaded
        pl_module.needs.update(collector.annotators)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """End the grader's process."""
        self.collector.close()

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Say what is about to happen."""
        collector, plan, steps = self.collector, self.collector.plan, pl_module.total_steps()
        tokens = steps // plan.rollout_steps * plan.rollout_prompts * collector.completions_per_prompt
        tokens *= collector.sampling.max_new_tokens
        rank_zero_info(
            f"Plan: {plan.describe()}; {steps} steps, at most {tokens:,} sampled tokens. "
            "On policy the loss is near 0 by construction: watch reward, entropy and accuracy instead."
        )
        if collector.sampling.filtered:
            told = ""
            if isinstance(collector.sampler, NativeSampler):
                told = "rollout/kept_mass logs how much of it the filter keeps."
            elif isinstance(collector.sampler, VLLMSampler):
                told = "The mismatch between vLLM and the policy is then neither measured nor corrected."
            rank_zero_warn(
                "top_k, top_p or min_p is set: completions come from the filtered distribution, while "
                "log-probabilities, entropy and self-certainty describe the unfiltered softmax(logits / "
                f"temperature). {told}"
            )

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: dict[str, Any], batch_idx: int) -> None:
        """Collect at the first slice of a rollout; put what the update and other callbacks need into the batch."""
        plan, number = self.collector.plan, batch["slice"]
        prompts = trainer.datamodule.prompts["train"]
        batch["prompts"] = [prompts[row] for row in batch["rows"]]
        batch["collected"] = None
        batch["last"] = number + 1 == plan.rollout_batches
        if number == 0 or self._collected is None:
            if number:
                rank_zero_warn("Resumed from the middle of a rollout: it is sampled anew with the current weights.")
            batch["collected"] = self._collected = self._collect(trainer, pl_module, batch)
            self._rollout = self._collected.rollout
        collected = self._collected
        window, part = divmod(number, plan.slices)
        if part == 0:
            self._update_start = pl_module.policy.clock()
            if pl_module.top_entropy_fraction < 1:
                self._rollout = learning_tokens(collected, window, pl_module.top_entropy_fraction, trainer)
        assert self._rollout is not None
        rollout = batch["rollout"] = self._rollout.slice(collected.windows[window][part])
        batch["old_logprob"] = None if plan.on_policy else rollout.samples.logprob
        batch["denominator"] = collected.denominators[window]

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log a finished optimiser step; let go of a finished rollout."""
        if (batch["slice"] + 1) % self.collector.plan.slices == 0:
            metrics = pl_module.window_metrics()
            metrics["time/update"] = pl_module.policy.clock() - self._update_start
            # These numbers belong to the step that was just taken: global_step has already moved on.
            log_now(trainer, metrics, step=trainer.global_step - 1)
            _warn(self._check.after_step(metrics))
            if pl_module.window.skipped_in_a_row:
                self._after_skip(trainer, pl_module, batch)
        if batch["last"]:
            self._collected = self._rollout = None

    def _after_skip(self, trainer: Trainer, module: RLIFModule, batch: dict[str, Any]) -> None:
        """Keep the completions of the first skipped steps, and end a run that skips step after step."""
        collected, step, logger = self._collected, trainer.global_step - 1, run_logger(trainer)
        assert collected is not None
        if module.window.skipped <= SKIPPED_STEPS and logger is not None:
            rows = torch.cat(collected.windows[batch["slice"] // self.collector.plan.slices]).sort().values.tolist()
            own = [completion_row(collected.rollout, batch, step, row) for row in rows]
            for part in gather_objects(trainer, own):
                if trainer.is_global_zero:
                    logger.attempt(partial(append_rows, Path(logger.log_dir) / SKIPPED, part))
        module.window.check_skipped()

    def _collect(self, trainer: Trainer, module: RLIFModule, batch: dict[str, Any]) -> Collected:
        """A rollout with the current weights; its metrics are logged and put into the batch."""
        collected = self.collector.collect(
            batch["prompts"],
            batch["positions"],
            run_seed(),
            module.policy,
            step=trainer.global_step,
            loss=module.loss,
            references=module.needs,
            kl_reference=module.reference,
            total=partial(trainer.strategy.reduce, reduce_op="sum"),
            progress=getattr(trainer.progress_bar_callback, "sampling", None),
        )
        metrics = rollout_metrics(trainer, collected)
        if trainer.global_step == 0:  # a continued run has shown that its rewards can work
            self.collector.check_first(metrics)
        if self._check.is_new:
            fraction, most = metrics["rollout/truncated_fraction"], self.collector.sampling.max_new_tokens
            _warn(mostly_cut_off(fraction, collected.rollout, batch["prompts"], module.policy, most))
        _warn(self._check.after_rollout(metrics, collected.weights))
        metrics["time/rollout"] = collected.sampling_seconds
        if module.needs:
            metrics["time/reference"] = collected.reference_seconds
        metrics |= peak_memory(module.device)
        log_now(trainer, metrics)
        batch["metrics"] = metrics
        return collected


def _warn(text: str | None) -> None:
    if text is not None:
        say_above_bar(text, warning=True)


def learning_tokens(collected: Collected, window: int, fraction: float, trainer: Trainer) -> Rollout:
    """The rollout with a mask of the tokens that learn from the advantage in an optimiser step (window).

    They are the share of the step's tokens with the highest entropy at sampling, over all processes.
    """
    rollout = collected.rollout
    assert rollout.loss_mask is not None
    rows = torch.cat(collected.windows[window]).to(rollout.loss_mask.device)
    own = torch.zeros_like(rollout.loss_mask)
    own[rows] = rollout.loss_mask[rows]

    def gather(values: Tensor) -> Tensor:
        return torch.cat(gather_objects(trainer, values.cpu())).to(values.device)

    mask = top_entropy_mask(rollout.statistics().entropy, own, fraction, gather)
    return replace(rollout, surrogate_mask=mask)
