"""From rewards to advantages and the tokens that count: weights, schedules, filters, and what is refused."""

import pytest
import torch

from rlif_lightning.data.batch_plan import BatchPlan
from rlif_lightning.data.problems import Problem
from rlif_lightning.data.prompts import Prompt
from rlif_lightning.errors import UserError
from rlif_lightning.functional.advantages import group_advantages
from rlif_lightning.functional.loss_records import LossSettings
from rlif_lightning.grading import AnswerFormat, Grader
from rlif_lightning.models.policy import Policy, PolicySettings
from rlif_lightning.rewards import MajorityVote, Reward, SelfCertainty, TokenEntropy
from rlif_lightning.rollout import Rollout, Samples
from rlif_lightning.sampling import NativeSampler, Sampling
from rlif_lightning.training.collector import AdvantageSettings, Collector, with_advantages
from tests.short_runs import adamw, fit


class Given(Reward):
    """Numbers known beforehand."""

    def __init__(self, values, weight=1.0, name="given"):
        super().__init__(weight)
        self.values, self._name = torch.tensor(values), name

    @property
    def name(self):
        return self._name

    def __call__(self, rollout):
        return self.values


class Words(Reward):
    """Needs an answer that random texts don't have."""

    requires = frozenset({"answers"})

    def __call__(self, rollout):
        return rollout.samples.lengths.float()


class Inverse(Reward):
    """Minus the self-certainty: cancels it."""

    def __call__(self, rollout):
        return -SelfCertainty()(rollout)


def rollout(groups=2, size=3, ended=None, votes=None):
    n = groups * size
    mask = torch.ones(n, 2, dtype=torch.bool)
    ended = torch.ones(n, dtype=torch.bool) if ended is None else torch.tensor(ended)
    samples = Samples(mask.long(), mask, mask.long(), mask, ended)
    return Rollout(samples, size, 1.0, torch.arange(n), votes=votes or [[None] * size] * groups)


A, B = [1.0, 2.0, 6.0, 0.0, 0.0, 1.0], [5.0, 3.0, 3.0, 2.0, 7.0, 1.0]


def test_each_reward_is_standardised_then_weighted_then_summed():
    """A weight of 0.1 acts as 0.1: standardising the sum, as some do, would give it another share."""
    rewards = [Given(A), Given([x * 1000 for x in B], 0.1, "other")]
    got = with_advantages(rollout(), rewards, [1.0, 0.1], AdvantageSettings()).rollout
    want = group_advantages(torch.tensor(A), 3)[0] + 0.1 * group_advantages(torch.tensor(B) * 1000, 3)[0]
    torch.testing.assert_close(got.advantages, want)
    alone = with_advantages(rollout(), rewards[1:], [0.1], AdvantageSettings()).rollout
    torch.testing.assert_close(alone.advantages, 0.1 * group_advantages(torch.tensor(B) * 1000, 3)[0])
    turned = with_advantages(rollout(), rewards[:1], [-1.0], AdvantageSettings()).rollout
    torch.testing.assert_close(turned.advantages, -group_advantages(torch.tensor(A), 3)[0])


def test_a_weight_of_zero_only_logs():
    both = [Given(A), Given(B, 0.0, "silent")]
    got = with_advantages(rollout(), both, [1.0, 0.0], AdvantageSettings())
    torch.testing.assert_close(got.rollout.advantages, group_advantages(torch.tensor(A), 3)[0])
    assert got.rollout.rewards["silent"].tolist() == B
    flat = [Given([1.0] * 6), Given(B, 0.0, "silent")]  # its spread doesn't open the gate
    assert with_advantages(rollout(), flat, [1.0, 0.0], AdvantageSettings()).gated.tolist() == [True, True]


def test_weights_follow_their_schedule():
    reward = SelfCertainty(weight=[(10, 1.0), (20, 0.0), (30, -2.0)])
    at = [reward.weight_at(s) for s in (0, 10, 15, 20, 25, 30, 99)]
    assert at == [1.0, 1.0, 0.5, 0.0, -1.0, -2.0, -2.0]
    assert SelfCertainty(weight=3).weight_at(7) == 3.0
    for wrong in ([], [(5, 1.0), (5, 2.0)], [(5, 1.0), (1, 2.0)]):
        with pytest.raises(UserError, match="nor a schedule"):
            SelfCertainty(weight=wrong)


def test_a_schedule_acts_in_training(model_folder, problems_file):
    rewards = [SelfCertainty(weight=[(0, 0.0), (2, 1.0)]), TokenEntropy(weight=[(0, 1.0), (2, 0.0)])]
    run = fit(model_folder(), problems_file, rollout={"rewards": rewards}, steps=3)
    for step, rolled in enumerate(run.rollouts):
        parts = [group_advantages(r, 4, min_spread=1e-4)[0] for r in rolled.rewards.values()]
        want = step / 2 * parts[0] + (1 - step / 2) * parts[1]
        torch.testing.assert_close(rolled.advantages, want, rtol=1e-5, atol=1e-6)


def test_a_schedule_may_begin_with_nothing(model_folder, problems_file):
    rewards = [SelfCertainty(weight=[(0, 0.0), (1, 0.0), (2, 1.0)])]
    run = fit(model_folder(), problems_file, rollout={"rewards": rewards}, optimizer=adamw(1e-2), steps=3)
    assert run.column("rollout/reward")[:2] == [0.0, 0.0] and run.column("rollout/reward")[2] > 0
    assert run.column("rollout/gated_fraction") == [1.0, 1.0, 0.0]
    assert run.column("train/grad_norm")[:2] == [0.0, 0.0] and run.column("train/grad_norm")[2] > 0


def test_the_agreement_filter_leaves_groups_out_of_the_loss():
    votes = [[0, 0, 1], [0, 1, 2]]  # agreement 2/3 and 1/3
    settings = AdvantageSettings(agreement_band=(0.5, 0.9))
    got = with_advantages(rollout(votes=votes), [Given(A)], [1.0], settings)
    assert got.filtered.tolist() == [False, True]
    want = group_advantages(torch.tensor(A), 3)[0]
    assert torch.equal(got.rollout.advantages, torch.cat([want[:3], torch.zeros(3)]))
    assert got.rollout.loss_mask.any(1).tolist() == [True] * 3 + [False] * 3
    edges = with_advantages(rollout(votes=votes), [Given(A)], [1.0], AdvantageSettings(agreement_band=(1 / 3, 2 / 3)))
    assert edges.filtered.tolist() == [False, False]


def test_truncated_completions_leave_statistics_and_loss():
    ended = [True, True, False, True, True, True]
    got = with_advantages(rollout(ended=ended), [Given(A)], [1.0], AdvantageSettings(mask_truncated=True)).rollout
    pair = group_advantages(torch.tensor(A[:2]), 2)[0]
    torch.testing.assert_close(got.advantages[:3], torch.cat([pair, torch.zeros(1)]))
    assert got.loss_mask.any(1).tolist() == ended


@pytest.mark.parametrize("settings", [{"scale": "batch"}, {"baseline": "leave_one_out"}, {"scale": "none"}])
def test_settings_reach_the_advantages(model_folder, problems_file, settings):
    from rlif_lightning.functional.advantages import batch_std

    run = fit(model_folder(), problems_file, rollout=settings, steps=1)
    rolled = run.rollouts[0]
    (rewards,) = rolled.rewards.values()
    std = batch_std(rewards) if settings.get("scale") == "batch" else None
    want = group_advantages(rewards, 4, min_spread=1e-4, batch_std=std, **settings)[0]
    torch.testing.assert_close(rolled.advantages, want, rtol=1e-4, atol=1e-6)
    plain = group_advantages(rewards, 4, min_spread=1e-4)[0]
    assert (rolled.advantages - plain).abs().max() > 1e-3


def test_answers_that_nobody_gives_are_said_before_the_first_update(model_folder, problems_file):
    with pytest.raises(UserError, match="words compares answers, and none of the first completions has one"):
        fit(model_folder(), problems_file, rollout={"rewards": [Words()]})  # boxed, which random texts are not
    with pytest.raises(UserError, match="agreement_band compares answers"):
        fit(model_folder(), problems_file, rollout={"agreement_band": (0.1, 0.9)})


def test_rewards_that_cancel_are_said_before_the_first_update(model_folder, problems_file):
    rewards = [SelfCertainty(), Inverse()]
    with pytest.raises(UserError, match="The rewards cancel"):
        fit(model_folder(), problems_file, rollout={"rewards": rewards})


@pytest.mark.parametrize("band", [(0.9, 0.1), (-0.1, 0.5), (0.5, 1.5)])
def test_bad_bands(band):
    from rlif_lightning.callbacks import RolloutCallback

    with pytest.raises(UserError, match="0 <= low <= high <= 1"):
        RolloutCallback(agreement_band=band)


def test_a_negative_spread_too_few_votes_and_only_silent_rewards():
    from rlif_lightning.callbacks import RolloutCallback

    with pytest.raises(UserError, match="min_spread is out of range"):
        RolloutCallback(min_spread=-1)
    with pytest.raises(UserError, match="votes is out of range"):
        RolloutCallback(group_size=8, votes=4)
    with pytest.raises(UserError, match="weight 0"):
        RolloutCallback(rewards=[SelfCertainty(weight=[(0, 0.0), (9, 0.0)])])


def test_votes_that_nothing_counts_and_a_reference_that_nothing_uses(model_folder, problems_file):
    with pytest.raises(UserError, match="votes nothing counts"):
        fit(model_folder(), problems_file, rollout={"votes": 9})
    with pytest.raises(UserError, match=r"model\.kl_coefficient above 0"):
        fit(model_folder(), problems_file, model={"reference": "ema"})


def test_more_votes_than_completions_change_agreement_not_the_samples(model_folder, problems_file):
    answers, rewards = AnswerFormat(completion="(.)"), [MajorityVote()]
    plain, voted = (
        fit(
            model_folder(), problems_file, rollout={"votes": v, "rewards": rewards}, steps=1, answers=answers
        ).rollouts[0]
        for v in (None, 9)
    )
    assert [len(v) for v in plain.votes] == [4, 4]
    assert [len(v) for v in voted.votes] == [9, 9]
    assert plain.texts == voted.texts and plain.answers == voted.answers
    assert torch.equal(plain.seeds, voted.seeds)
    for own, everyone in zip(plain.votes, voted.votes, strict=True):
        assert own == everyone[:4]
    want = MajorityVote()(voted)
    assert torch.equal(voted.rewards["majority_vote"].nan_to_num(9), want.nan_to_num(9))


@pytest.mark.parametrize("requires", [frozenset({"answermask"}), "answer_mask"])
def test_a_requirement_that_does_not_exist_is_refused(requires):
    reward = type("Misspelt", (Words,), {"requires": requires})()
    with pytest.raises(UserError, match=r"(?s)Misspelt requires what no rollout has.*answer_mask"):
        Collector(NativeSampler(), Sampling(4), [reward], BatchPlan(1, 2))


def test_without_a_trainer_annotators_score_the_rollout_if_they_were_made(model_folder):
    policy = Policy.load(PolicySettings(str(model_folder())))
    collector = Collector(NativeSampler(), Sampling(4), [SelfCertainty(annotator="ema")], BatchPlan(1, 2))
    collector.open(1, AnswerFormat(), has_labels=False)
    prompts = [Prompt("a", (5, 6), Problem("a", None))]
    try:
        policy.make_references(["frozen"])
        with pytest.raises(UserError, match=r"no ema reference(?s:.*)make_references\(\['ema'\]\)"):
            collector.collect(prompts, [(0, 0)], 0, policy, step=0, loss=LossSettings())
        policy.make_references(["ema"])
        collected = collector.collect(prompts, [(0, 0)], 0, policy, step=0, loss=LossSettings())
        with pytest.raises(ValueError, match="got 1 and 0"):
            collector.collect(prompts, [], 0, policy, step=0, loss=LossSettings())
    finally:
        collector.close()
    assert collected.rollout.annotations.keys() == {"ema"}


def test_answers_without_time_are_logged(model_folder, problems_file, monkeypatch):
    monkeypatch.setattr(Grader, "grade", lambda self, items: [setattr(self, "timeouts", 3) or False for _ in items])
    assert fit(model_folder(), problems_file, steps=1).column("rollout/grading_timeouts") == [3.0]
