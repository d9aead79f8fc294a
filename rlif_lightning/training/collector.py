"""From prompts to a rollout that can be trained on. No Trainer here."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from rlif_lightning.data.batch_plan import MOST_COMPLETIONS, BatchPlan
from rlif_lightning.data.prompts import Prompt
from rlif_lightning.errors import UserError, check_ranges
from rlif_lightning.functional.loss_records import LossSettings
from rlif_lightning.functional.losses import loss_denominator
from rlif_lightning.functional.seeds import completion_seed, completion_seeds
from rlif_lightning.grading import ROLLOUT_SECONDS, AnswerFormat, Grader
from rlif_lightning.models.policy import Policy
from rlif_lightning.models.references import ANNOTATORS, ReferenceKind
from rlif_lightning.models.token_text import answer_mask
from rlif_lightning.rewards import Reward
from rlif_lightning.rewards.base import requirements_of, statistics_of
from rlif_lightning.rollout import Rollout
from rlif_lightning.runs.signals import apart
from rlif_lightning.sampling import Sampler, Sampling
from rlif_lightning.sampling.protocol import Progress, up_to_date
from rlif_lightning.training.rewarding import AdvantageSettings, with_advantages
from rlif_lightning.training.scores import score_slices, with_importance, with_scores
from rlif_lightning.training.slice_loss import takes_fused_loss

READING = frozenset({"answers", "answer_mask"})  # what a reward may require that takes the reading of answers
ENGINE_KL = 0.1
"""Nats per token between sampler and policy from which on the sampler computes something else than the policy."""


@dataclass(frozen=True)
class Collected:
    """A rollout, and how its updates are cut from it."""

    rollout: Rollout
    gated: Tensor  # [P] bool: the spread of every reward with a weight is too small
    filtered: Tensor | None  # [P] bool: agreement outside the band, where there is a band
    weights: list[float]  # of the rewards, at the step of this rollout
    windows: list[list[Tensor]]  # row numbers of the slices of each optimiser step
    denominators: list[float]  # D of each optimiser step
    sampling_seconds: float
    reference_seconds: float


class Collector:
    """Draws completions with the current policy, scores and rewards them, and cuts them into updates.

    The settings are those of :class:`~rlif_lightning.callbacks.RolloutCallback`. Until :meth:`open` the plan is that
    of one process.

    Raises:
        UserError: A reward is named twice, all are silent, or a number is out of range.
    """

    def __init__(
        self,
        sampler: Sampler,
        sampling: Sampling,
        rewards: Sequence[Reward],
        plan: BatchPlan,
        advantages: AdvantageSettings | None = None,
        votes: int | None = None,
        importance_cap: float | None = 2.0,
    ) -> None:
        # Asked of all of them: a reward whose __init__ forgot its base class says so here.
        silent, names = [r.is_silent for r in rewards], [r.name for r in rewards]
        if not names:
            raise UserError("rollout.rewards is empty", expected="at least one reward; null: SelfCertainty")
        if len(set(names)) < len(names):
            got = ", ".join(f"{r.name} ({r.class_path})" for r in rewards if names.count(r.name) > 1)
            do = "keep one (--rollout.rewards replaces the recipe's), or override `name` in one of your classes"
            raise UserError("A reward is named twice", got=got, do=do)
        if all(silent):
            raise UserError("Every reward has weight 0, so nothing would be learned", got=", ".join(names))
        least, most, cap = plan.group_size, MOST_COMPLETIONS, importance_cap
        check_ranges(
            "rollout",
            ("votes", votes, votes is None or least <= votes <= most, f"{least} (group_size) to {most}"),
            ("importance_cap", cap, cap is None or cap >= 1, "1 or more, or null for no weights"),
        )
        self.sampler, self.rewards, self.plan, self.votes = sampler, rewards, plan, votes
        self.advantages = advantages or AdvantageSettings()
        self.importance_cap = importance_cap
        self.sampling = replace(sampling, statistics=statistics_of(rewards))
        self.requires = requirements_of(rewards)
        self.needs_answers = bool(self.requires & READING) or self.advantages.agreement_band is not None
        self.grader: Grader | None = None

    @property
    def completions_per_prompt(self) -> int:
        """Completions per prompt that are sampled."""
        return self.votes or self.plan.group_size

    @property
    def annotators(self) -> set[ReferenceKind]:
        """The references that the rewards ask for."""
        return {kind for kind, name in ANNOTATORS.items() if name in self.requires}

    def open(self, world_size: int, answers: AnswerFormat, has_labels: bool) -> None:
        """Get ready for data, with or without reference answers; :meth:`close` ends the grader's process."""
        self.plan = replace(self.plan, world_size=world_size)
        if "labels" in self.requires and not has_labels:
            names = ", ".join(r.name for r in self.rewards if "labels" in r.requires)
            raise UserError(
                f"The reward {names} compares answers, and the training data has none",
                do="name the answer's field in --data.train.answer, or choose an internal reward",
            )
        if self.votes is not None and not self.needs_answers:
            raise UserError(
                "rollout.votes samples completions whose votes nothing counts",
                got=f"rollout.votes {self.votes}; rewards {', '.join(r.name for r in self.rewards)}",
                do="leave it out, or reward with MajorityVote or ClusterFrequency, or set rollout.agreement_band",
            )
        self.grader = Grader(answers, budget=ROLLOUT_SECONDS)

    def close(self) -> None:
        """End the grader's process."""
        if self.grader is not None:
            self.grader.close()

    def check_first(self, metrics: Mapping[str, float]) -> None:
        """Refuse a sampler or rewards that the first rollout's metrics show to fail on this model and data."""
        if metrics.get("rollout/engine_kl", 0.0) > ENGINE_KL:
            raise UserError(
                "The engine of rollout.sampler computes something else than the policy",
                got=f"{metrics['rollout/engine_kl']:.3g} nats per token between them",
                expected=f"at most {ENGINE_KL}; below 0.01 in bfloat16, near 0 in float32",
                do="leave rollout.sampler out",
            )
        if self.needs_answers and not metrics.get("rollout/answered_fraction"):
            names = [r.name for r in self.rewards if r.requires & READING] or ["agreement_band"]
            raise UserError(
                f"{', '.join(names)} compares answers, and none of the first completions has one",
                do="say in --data.answers.completion where answers stand, or choose another reward",
            )
        if metrics["rollout/advantage_size"] < 1e-6 and metrics["rollout/gated_fraction"] < 1:
            raise UserError(
                "The rewards cancel: their weighted advantages sum to 0 for every completion",
                got=", ".join(r.name for r in self.rewards),
                do="change --rollout.rewards or their weights",
            )

    def collect(
        self,
        prompts: Sequence[Prompt],
        positions: Sequence[tuple[int, ...]],
        seed: int,
        policy: Policy,
        *,
        step: int,
        loss: LossSettings,
        references: Collection[ReferenceKind] = (),
        kl_reference: ReferenceKind | None = None,
        total: Callable[[Tensor], Tensor] = lambda x: x,
        progress: Progress | None = None,
    ) -> Collected:
        """Draw, score, reward and cut one rollout. Where processes work together, to be called on all.

        Args:
            prompts: P, of this process; none is a ValueError.
            positions: Of each prompt in the run, which seed its completions.
            seed: Of the run.
            policy: Draws the completions.
            step: The optimiser step, at which the rewards have their weights.
            loss: Whose denominators the windows get.
            references: Those that score the completions besides those that the rewards ask for.
            kl_reference: The one that the KL term refers to.
            total: Sums a tensor over the processes.
            progress: Told how far the sampler is.
        """
        if not 0 < len(prompts) == len(positions):
            raise ValueError(f"expected prompts and a position for each, got {len(prompts)} and {len(positions)}")
        start, head_weight_only = policy.clock(), takes_fused_loss(policy.model, loss)  # as the update
        dealer = torch.Generator().manual_seed(completion_seed(seed, *positions[0], -1))
        with up_to_date(self.sampler, policy) as model:
            with apart():
                rollout = self.sample(prompts, positions, seed, policy, progress)
            windows = self.plan.cut(rollout.samples.lengths.cpu(), dealer)
            slices = [rows for window in windows[: self.plan.steps_per_rollout] for rows in window]
            rollout = with_scores(rollout, model, self.sampling, slices, head_weight_only)
            rollout = with_importance(rollout, self.importance_cap)
            sampled = policy.clock()
            rollout = self.with_references(rollout, policy, slices, references, kl_reference, head_weight_only)
            referred = policy.clock()
            weights = [r.weight_at(step) for r in self.rewards]
            rollout, gated, filtered = with_advantages(rollout, self.rewards, weights, self.advantages, total)
        mask, tokens, seconds = rollout.loss_mask, self.sampling.max_new_tokens, (sampled - start, referred - sampled)
        assert mask is not None
        own = [sum(loss_denominator(mask[rows], loss, tokens) for rows in window) for window in windows]
        denominators = total(torch.stack([torch.as_tensor(x) for x in own]).float()).clamp(min=1).tolist()
        return Collected(rollout, gated, filtered, weights, windows, denominators, *seconds)

    def sample(
        self,
        prompts: Sequence[Prompt],
        positions: Sequence[tuple[int, ...]],
        seed: int,
        policy: Policy,
        progress: Progress | None = None,
    ) -> Rollout:
        """Draw a group per prompt and read the answers out of the texts; within :func:`up_to_date`."""
        grader, group, drawn = self.grader, self.plan.group_size, self.completions_per_prompt
        assert grader is not None, "call open() before sample()"
        grader.begin()
        seeds = completion_seeds(seed, positions, drawn)
        samples = self.sampler.sample([p.ids for p in prompts], drawn, seeds, self.sampling, progress)
        pairs = list(zip(samples.texts(policy.decode), samples.ended.tolist(), strict=True))
        answers = grader.extract_answers(pairs)
        votes = [grader.classes(answers[i : i + drawn]) for i in range(0, len(answers), drawn)]
        if drawn > group:
            keep = [i for i in range(len(pairs)) if i % drawn < group]
            samples, seeds = samples.rows(torch.tensor(keep)), seeds[keep]
            pairs, answers = [pairs[i] for i in keep], [answers[i] for i in keep]
        texts = [text for text, _ in pairs]
        rollout = Rollout(samples, group, self.sampling.temperature, seeds, texts, answers, votes=votes)
        if "answer_mask" in self.requires:
            mask = answer_mask(samples, texts, grader.answer_spans(pairs), policy.tokenizer)
            rollout = replace(rollout, answer_mask=mask)
        golds = [p.problem.gold for p in prompts for _ in range(group)]
        if None not in golds:
            grades = grader.grade([(t, e, g) for (t, e), g in zip(pairs, golds, strict=True) if g is not None])
            correct = torch.tensor(grades, dtype=torch.float32, device=samples.completion_ids.device)
            rollout = replace(rollout, correct=correct)
        return replace(rollout, grading_timeouts=grader.timeouts)

    def sample_batches(
        self,
        prompts: Sequence[Prompt],
        positions: Sequence[tuple[int, ...]],
        seed: int,
        policy: Policy,
        size: int,
        progress: Callable[[int, int, int], None] | None = None,
    ) -> Iterator[Rollout]:
        """Draw and score a group per prompt, ``size`` prompts at a time, without references or rewards.

        Arguments are those of :meth:`collect`; progress also gets the prompts done: (prompts, tokens, most tokens).
        """
        with up_to_date(self.sampler, policy) as model:
            for start in range(0, len(prompts), size):
                part, tell = slice(start, start + size), None if progress is None else partial(progress, start)
                drawn = self.sample(prompts[part], positions[part], seed, policy, tell)
                yield with_scores(drawn, model, self.sampling, self.plan.in_order(len(drawn.seeds)))

    def with_references(
        self,
        rollout: Rollout,
        policy: Policy,
        slices: Sequence[Tensor],
        references: Collection[ReferenceKind],
        kl_reference: ReferenceKind | None,
        head_weight_only: bool = True,
    ) -> Rollout:
        """Score the rollout under references: for the KL term, and for rewards that read their statistics."""
        for kind in sorted({*references, *self.annotators}):
            wanted = kind in self.annotators
            with policy.reference(kind) as model:
                logprob, stats = score_slices(model, rollout, slices, self.sampling, wanted, head_weight_only)
            if stats is not None:
                rollout = replace(rollout, annotations={**rollout.annotations, ANNOTATORS[kind]: stats})
            if kind == "frozen":
                rollout = replace(rollout, start_logprob=logprob)
            if kind == kl_reference:
                rollout = replace(rollout, kl_logprob=logprob)
        return rollout
