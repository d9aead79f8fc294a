"""Warnings about rollouts and steps that teach nothing, from their metrics, with the setting that helps."""

import math
from collections.abc import Mapping, Sequence

from rlif_lightning.training.cut_off import LONGER
from rlif_lightning.training.rewarding import AdvantageSettings

IN_A_ROW = 3  # rollouts, or steps, that teach nothing before a warning


class LearningCheck:
    """Looks at the metrics of each rollout and of each step; each warning comes once.

    ``abstains``: a reward may leave completions out with good reason.
    """

    def __init__(self, settings: AdvantageSettings, abstains: bool = False) -> None:
        self.settings, self.abstains = settings, abstains
        self.is_new, self._has_taught = True, False  # has seen no rollout; none that taught anything
        self._rollouts = self._steps = 0  # in a row that taught nothing
        self._said: set[str] = set()

    def after_rollout(self, metrics: Mapping[str, float], weights: Sequence[float]) -> str | None:
        """What to say after a rollout, from its ``rollout/*`` and its rewards' weights; mostly nothing."""
        self.is_new = False
        self._has_taught |= metrics["rollout/advantage_size"] > 0
        self._rollouts = 0 if metrics["rollout/advantage_size"] else self._rollouts + 1
        if self._rollouts < IN_A_ROW:
            missing = 0.0 if self.abstains else metrics["rollout/unscored_fraction"]
            text = (
                f"The rewards gave no finite number for {missing:.0%} of the completions, whose advantage is then 0"
            )
            return self._once("unscored", f"{text}; rollout/unscored_fraction counts them.") if missing else None
        why = self._why_no_advantage(metrics, weights)
        return self._once("rollout", f"{IN_A_ROW} rollouts in a row taught nothing: {why}.")

    def after_step(self, metrics: Mapping[str, float]) -> str | None:
        """What to say after a step, from its ``train/*``; nothing where its rollout is what taught nothing."""
        norm = metrics["train/grad_norm"]
        if not math.isfinite(norm):
            text = f"A step was skipped, because the norm of its gradient is {norm}; the weights stay as they were. "
            text += "train/skipped_steps counts such steps; the run folder's skipped.jsonl holds their completions."
            if metrics.get("train/loss_scale", 0) > 1:
                text += " In float16 the first steps may overflow: each one halves train/loss_scale."
            return self._once("skipped", text)
        self._steps = 0 if norm or self._rollouts else self._steps + 1
        if self._steps < IN_A_ROW:
            return None
        why = "no trainable weight has a gradient; look at model.lora and its target_modules"
        if metrics["train/clip_fraction"] == 1:
            why = "every token's ratio is clipped; lower model.optimizer.lr or raise model.clip_high"
        return self._once("step", f"{IN_A_ROW} steps in a row changed nothing: {why}.")

    def _once(self, about: str, text: str) -> str | None:
        if about in self._said:
            return None
        self._said.add(about)
        return text

    def _why_no_advantage(self, metrics: Mapping[str, float], weights: Sequence[float]) -> str:
        """The reason and the setting that helps."""
        settings, cut_off = self.settings, metrics["rollout/truncated_fraction"]
        if not any(weights):
            return "every reward has weight 0 at these steps; give one another weight in rollout.rewards"
        if metrics.get("rollout/filtered_fraction") == 1:
            return "the agreement of every prompt lies outside rollout.agreement_band; widen it"
        if settings.mask_truncated and cut_off > 0.5:
            return f"{cut_off:.0%} of the completions were cut off, and rollout.mask_truncated drops them; {LONGER}"
        if metrics["rollout/unscored_fraction"] == 1:
            return "the rewards scored no completion; choose another reward in rollout.rewards"
        if metrics["rollout/gated_fraction"] < 1:
            return "the weighted rewards cancel; change rollout.rewards or their weights"
        if settings.min_spread > AdvantageSettings.min_spread:
            return f"the rewards of no group differ by more than rollout.min_spread {settings.min_spread:g}; lower it"
        if self._has_taught:
            return "all rewards of a group are equal by now; where all is not learned, lower model.optimizer.lr"
        return "all rewards of a group are equal; raise rollout.temperature, or change rollout.rewards or the prompts"
