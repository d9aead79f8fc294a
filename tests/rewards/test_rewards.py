"""The reward classes against loops over plain numbers, hand-worked votes, and through the command line."""

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from rlif_lightning import rewards
from rlif_lightning.errors import UserError
from rlif_lightning.functional.seeds import completion_seed, completion_seeds
from rlif_lightning.functional.token_stats import token_stats
from rlif_lightning.main import main
from rlif_lightning.rewards import (
    ClusterFrequency,
    ExpectedAgreement,
    Format,
    Length,
    MajorityVote,
    ProbabilityMargin,
    Random,
    Reward,
    SelfCertainty,
    Shuffled,
    TokenEntropy,
    TrajectoryEntropy,
    Verifiable,
)
from rlif_lightning.rewards.base import statistics_of
from rlif_lightning.rollout import Rollout, Samples
from rlif_lightning.training.rewarding import AdvantageSettings, with_advantages

INTERNAL = [SelfCertainty, TokenEntropy, TrajectoryEntropy, ExpectedAgreement, ProbabilityMargin]
OWN = statistics_of([ExpectedAgreement(), ProbabilityMargin()])
T, V = 6, 5


def made(prompts=2, group=4, seed=0, **content):
    """A rollout of random distributions and lengths; returns it with its logits [N, T, V]."""
    n = prompts * group
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, T, V, generator=g, dtype=torch.float64) * 2
    ids = torch.randint(V, (n, T), generator=g)
    mask = torch.arange(T) < torch.randint(1, T + 1, (n, 1), generator=g)
    samples = Samples(
        prompt_ids=torch.zeros(n, 1, dtype=torch.long), prompt_mask=torch.ones(n, 1, dtype=torch.bool),
        completion_ids=ids, completion_mask=mask, ended=torch.ones(n, dtype=torch.bool),
        stats=token_stats(logits, ids, own=OWN).map(lambda x: x.where(mask, torch.nan)),
    )  # fmt: skip
    seeds = completion_seeds(seed, [(0, p) for p in range(prompts)], group)
    return Rollout(samples, group, 1.0, seeds, **content), logits


def voted(*votes, group=4):
    """A rollout of given classes of answers."""
    answers = [None if x is None else f"answer {x}" for votes_of_one in votes for x in votes_of_one[:group]]
    return made(len(votes), group, votes=[list(v) for v in votes], answers=answers)[0]


# -- internal ---------------------------------------------------------------------------------------------------


def token_value(reward, z, token):
    """What one token is worth, by the definition in the docstring, larger is more certain."""
    e = [math.exp(x) for x in z]
    p = [x / sum(e) for x in e]
    first, second = sorted(p)[-1:-3:-1]
    return {
        SelfCertainty: sum(math.log((1 / V) / x) / V for x in p),
        TokenEntropy: sum(x * math.log(x) for x in p),
        TrajectoryEntropy: math.log(p[token]),
        ExpectedAgreement: sum(x * x for x in p),
        ProbabilityMargin: first - second,
    }[reward]


def naive(reward, samples, logits, aggregation, k, q):
    out = []
    for ids, n, rows in zip(samples.completion_ids.tolist(), samples.lengths.tolist(), logits.tolist(), strict=True):
        values = [token_value(reward, z, token) for z, token in zip(rows[:n], ids[:n], strict=True)]
        if aggregation == "last_k":
            values = values[-k:]
        if aggregation == "bottom_q":
            values = sorted(values)[: math.ceil(q * n)]
        out.append(sum(values) / (1 if aggregation == "sum" else len(values)))
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("aggregation", ["mean", "sum", "last_k", "bottom_q"])
@pytest.mark.parametrize("reward", INTERNAL)
def test_internal_rewards_against_loops(reward, aggregation):
    rollout, logits = made()
    want = naive(reward, rollout.samples, logits, aggregation, 2, 0.4)
    got = reward(aggregation, k=2, q=0.4)(rollout)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reward", INTERNAL)
def test_the_certain_completion_is_worth_more(reward):
    """Which way round: a sharp distribution whose likeliest token was drawn, against the uniform one."""
    rollout, _ = made(1, 2)
    logits = torch.zeros(2, T, V)
    logits[0, :, 1] = 8.0
    ids = torch.ones(2, T, dtype=torch.long)
    mask = torch.ones(2, T, dtype=torch.bool)
    stats = token_stats(logits, ids, own=OWN)
    samples = replace(rollout.samples, completion_ids=ids, completion_mask=mask, stats=stats)
    for aggregation in ("mean", "sum", "last_k", "bottom_q"):
        sharp, flat = reward(aggregation)(replace(rollout, samples=samples)).tolist()
        assert sharp > flat
    if reward in (ExpectedAgreement, ProbabilityMargin):  # of uniform p: 1/V and 0
        assert flat == pytest.approx(1 / V if reward is ExpectedAgreement else 0, abs=1e-6)
        assert 0.99 < sharp <= 1


@pytest.mark.parametrize("annotator", ["reference", "ema"])
@pytest.mark.parametrize("reward", INTERNAL)
def test_an_annotator_scores_in_the_policys_place(reward, annotator):
    rollout, _ = made()
    other, logits = made(seed=1)
    # the annotator's distributions, for the tokens and lengths of this rollout
    stats = token_stats(logits, rollout.samples.completion_ids, own=OWN)
    annotated = replace(rollout, annotations={annotator: stats, "nobody": other.samples.stats})
    asked = reward(annotator=annotator)
    want = naive(reward, rollout.samples, logits, "mean", 1, 1)
    torch.testing.assert_close(asked(annotated), want, rtol=1e-12, atol=1e-12)
    assert asked.requires == {annotator}
    assert reward().requires == frozenset()


def test_what_rewards_ask_of_the_sampler():
    path = "rlif_lightning.rewards.internal."
    assert {r: set(r().statistics) for r in INTERNAL} == {
        SelfCertainty: set(), TokenEntropy: set(), TrajectoryEntropy: set(),
        ExpectedAgreement: {path + "ExpectedAgreement"}, ProbabilityMargin: {path + "ProbabilityMargin"},
    }  # fmt: skip


def test_names():
    given = {
        "self_certainty": SelfCertainty(),
        "self_certainty_last_k": SelfCertainty("last_k"),
        "token_entropy_bottom_q_reference": TokenEntropy("bottom_q", annotator="reference"),
        "trajectory_entropy_sum_ema": TrajectoryEntropy("sum", annotator="ema"),
        "expected_agreement": ExpectedAgreement(),
        "probability_margin": ProbabilityMargin(),
        "majority_vote": MajorityVote(),
        "cluster_frequency": ClusterFrequency(),
        "format": Format(),
        "length_short": Length("short"),
        "length_long": Length("long"),
        "random": Random(),
        "verifiable": Verifiable(),
        "shuffled_token_entropy_sum": Shuffled(TokenEntropy("sum")),
    }
    assert {name: reward.name for name, reward in given.items()} == {name: name for name in given}


def test_every_class_is_offered_and_described():
    offered = {name for name in rewards.__all__ if name not in ("Reward", "InternalReward")}
    assert offered == {c.__name__ for c in (*INTERNAL, ClusterFrequency, MajorityVote, Format, Length, Random,
                                            Shuffled, Verifiable)}  # fmt: skip
    page = (Path(__file__).parents[2] / "docs/rewards.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in offered)


# -- answers ----------------------------------------------------------------------------------------------------

NAN = None  # how a value that is not a number is written below


def numbers(values):
    return [None if math.isnan(v) else round(v, 6) for v in values.tolist()]


@pytest.mark.parametrize(
    ("votes", "threshold", "wanted"),
    [
        ([0, 1, 1, 1], 0.0, [0, 1, 1, 1]),
        ([0, 1, 1, 0], 0.0, [1, 0, 0, 1]),  # a tie: the class that comes first
        ([5, 2, 2, 5], 0.0, [1, 0, 0, 1]),  # ... whatever its number
        ([None, None, None, 0], 0.0, [0, 0, 0, 1]),  # no answer is the most frequent, and can't win
        ([None, None, None, None], 0.0, [NAN, NAN, NAN, NAN]),
        ([0, 1, 2, 3], 0.0, [1, 0, 0, 0]),
        ([0, 0, 0, 1], 0.75, [1, 1, 1, 0]),  # at the threshold: a majority
        ([0, 0, 0, 1], 0.76, [NAN, NAN, NAN, NAN]),
        ([0, 0, None, None], 0.6, [NAN, NAN, NAN, NAN]),  # half of the votes, unanswered ones counted
        ([0, 1, 1, 1, 0, 0, 0], 0.0, [1, 0, 0, 0]),  # three more vote, and turn it round
        ([1, 1, 0, 0, 2, 2, 2], 0.0, [0, 0, 0, 0]),  # the winner is not in the group
        ([0, 0, 0, 0, 1, None, None, None], 0.55, [NAN, NAN, NAN, NAN]),  # 4 of 8 votes, not 4 of 4
        ([None, None, None, None, 0], 0.0, [0, 0, 0, 0]),
    ],
)
def test_majority_vote_by_hand(votes, threshold, wanted):
    rollout = voted([7, 7, 7, 8], votes)  # beside a group that must not enter
    first = [NAN] * 4 if threshold > 0.75 else [1, 1, 1, 0]
    assert numbers(MajorityVote(threshold)(rollout)) == [*first, *wanted]


def test_the_threshold_means_its_decimals():
    """14 of 25 is 0.56, though 0.56 * 25 as floats is above 14."""
    assert 0.56 * 25 > 14
    rollout = voted([0] * 14 + [1] * 11, group=25)
    assert MajorityVote(0.56)(rollout).sum() == 14


@pytest.mark.parametrize(
    ("votes", "wanted"),
    [
        ([0, 1, 1, 1], [0.25, 0.75, 0.75, 0.75]),
        ([0, None, None, 0], [0.5, 0, 0, 0.5]),
        ([None, None, None, None], [0, 0, 0, 0]),
        ([0, 1, 1, 2, 2, 2, 2, None], [0.125, 0.25, 0.25, 0.5]),
    ],
)
def test_cluster_frequency_by_hand(votes, wanted):
    rollout = voted([0, 0, 0, 0], votes)
    assert numbers(ClusterFrequency()(rollout)) == [1, 1, 1, 1, *wanted]


@pytest.mark.parametrize("threshold", [-0.1, 1.1, math.nan])
def test_a_threshold_is_a_share(threshold):
    with pytest.raises(UserError, match="from 0 to 1"):
        MajorityVote(threshold)


def advantages(rollout, *chosen, step=0, **settings):
    return with_advantages(rollout, chosen, [r.weight_at(step) for r in chosen], AdvantageSettings(**settings))[:2]


def test_prompts_that_abstain_teach_nothing():
    rollout, gated = advantages(voted([0, 0, 1, 2], [0, 0, 0, 1], [None] * 4), MajorityVote(0.6))
    assert gated.tolist() == [True, False, True]
    assert rollout.advantages[[0, 1, 2, 3, 8, 9, 10, 11]].tolist() == [0.0] * 8
    # 1, 1, 1, 0: mean 3/4, standard deviation 1/2
    assert rollout.advantages[4:8].tolist() == pytest.approx([0.5, 0.5, 0.5, -1.5], abs=1e-3)


def test_a_rollout_may_abstain_as_a_whole_and_a_broken_reward_may_not():
    rollout = voted([0, 1, 2, 3], [None] * 4)
    done, gated = advantages(rollout, MajorityVote(0.5))
    assert gated.all() and not done.advantages.any()
    assert Shuffled(MajorityVote()).abstains

    class Broken(Reward):
        def __call__(self, rollout):
            return torch.full((8,), torch.nan)

    with pytest.raises(UserError, match="no finite number"):
        advantages(rollout, Broken())


# -- baselines and controls -------------------------------------------------------------------------------------


def test_format_and_length():
    rollout = voted([0, None, 1, 1], [None, 2, None, 0])
    assert Format()(rollout).tolist() == [1, 0, 1, 1, 0, 1, 0, 1]
    assert Format.requires == {"answers"}
    tokens = rollout.samples.completion_mask.sum(1).tolist()
    assert len(set(tokens)) > 1
    assert Length("long")(rollout).tolist() == tokens
    assert Length("short")(rollout).tolist() == [-t for t in tokens]


def test_shuffled_deals_each_groups_own_values():
    rollout, _ = made(200, 4)
    inner, shuffled = SelfCertainty(), Shuffled(SelfCertainty())
    own, dealt = (r(rollout).view(-1, 4) for r in (inner, shuffled))
    assert torch.equal(own.sort(1).values, dealt.sort(1).values)
    assert torch.equal(dealt, shuffled(rollout).view(-1, 4))
    # Every place gets the value of every place about as often: 50 of 200, standard deviation 6.
    came_from = (dealt[:, :, None] == own[:, None, :]).double().sum(0)  # [to, from]
    assert came_from.sum() == 800
    assert (came_from - 50).abs().max() < 25
    # Another stream than Random's: that reward's order would deal the same values.
    other = torch.tensor([completion_seed(int(s), 1) for s in rollout.seeds]).view(-1, 4)
    by_random = own.gather(1, other.argsort(1)).gather(1, rollout.seeds.view(-1, 4).argsort(1).argsort(1))
    assert not torch.equal(dealt, by_random)


def test_shuffled_depends_on_seeds_alone():
    """Neither the place of the group, nor that of a row in its group, nor other groups enter."""
    rollout, _ = made(6, 4)
    want = Shuffled(TokenEntropy())(rollout)
    assert not torch.equal(want, TokenEntropy()(rollout))
    order = torch.tensor([17, 19, 16, 18, 3, 1, 0, 2])
    moved = replace(rollout, samples=rollout.samples.rows(order), seeds=rollout.seeds[order])
    assert torch.equal(Shuffled(TokenEntropy())(moved), want[order])


def test_shuffled_needs_what_its_reward_needs():
    assert Shuffled(MajorityVote()).requires == {"answers"}
    assert Shuffled(Verifiable()).requires == {"labels"}
    margin = Shuffled(ProbabilityMargin(annotator="reference"), weight=0.5)
    assert margin.requires == {"reference"}
    assert margin.statistics.keys() == ProbabilityMargin("sum", weight=0.3).statistics.keys() != {}
    assert margin.weight_at(0) == 0.5
    with pytest.raises(UserError, match="weight of the reward random does nothing"):
        Shuffled(Random(weight=0.5))


# -- weights ----------------------------------------------------------------------------------------------------


def test_a_negative_weight_turns_the_advantages_round():
    rollout, _ = made()
    right, wrong = (advantages(rollout, SelfCertainty(weight=w))[0] for w in (1.0, -1.0))
    assert right.advantages.abs().min() > 0.01
    assert torch.equal(wrong.advantages, -right.advantages)
    assert torch.equal(wrong.rewards["self_certainty"], right.rewards["self_certainty"])


def test_a_weight_follows_its_schedule():
    reward = Random(weight=[[10, 1.0], [20, 0.0], [40, -2.0]])
    by_hand = {0: 1.0, 10: 1.0, 15: 0.5, 20: 0.0, 25: -0.5, 40: -2.0, 99: -2.0}
    assert {step: reward.weight_at(step) for step in by_hand} == pytest.approx(by_hand)
    assert not reward.is_silent
    assert Random(weight=[[0, 0.0], [9, 0]]).is_silent
    rollout, _ = made()
    half = advantages(rollout, SelfCertainty(), Random(weight=[[10, 1.0], [20, 0.0]]), step=15)[0].advantages
    whole = [advantages(rollout, r)[0].advantages for r in (SelfCertainty(), Random())]
    torch.testing.assert_close(half, whole[0] + 0.5 * whole[1])


@pytest.mark.parametrize("weight", [[], [[5, 1.0], [5, 0.0]], [[5, 1.0], [4, 0.0]]])
def test_a_schedule_whose_steps_do_not_rise_is_refused(weight):
    with pytest.raises(UserError, match="nor a schedule"):
        Random(weight=weight)


@pytest.mark.parametrize("window", [{"k": 0}, {"k": -1}, {"q": 0}, {"q": 1.5}, {"q": math.nan}])
def test_windows_out_of_range_are_refused(window):
    with pytest.raises(UserError, match="aggregation of the reward TokenEntropy"):
        TokenEntropy(**window)


# -- recipes ----------------------------------------------------------------------------------------------------

ROOM = "rlif_lightning.rewards."


def recipe(path, *chosen):
    content = [{"class_path": ROOM + name, "init_args": args} for name, args in chosen]
    path.write_text(yaml.safe_dump({"rollout": {"rewards": content}}))
    return str(path)


def test_nested_rewards_and_schedules_in_yaml(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inner = {"class_path": ROOM + "TokenEntropy", "init_args": {"aggregation": "bottom_q", "q": 0.1}}
    own = recipe(
        tmp_path / "own.yaml",
        ("Shuffled", {"reward": inner, "weight": [[0, 1.0], [50, 0.0]]}),
        ("SelfCertainty", {"aggregation": "last_k", "k": 4, "weight": -1.0}),
    )
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--config", "quickstart", "--config", own, "--print_config"])
    assert exit_.value.code == 0
    shuffled, certainty = yaml.safe_load(capsys.readouterr().out)["rollout"]["rewards"]
    assert shuffled["init_args"]["weight"] == [[0, 1.0], [50, 0.0]]
    nested = shuffled["init_args"]["reward"]
    assert nested["class_path"] == ROOM + "TokenEntropy"
    assert nested["init_args"] == {
        "aggregation": "bottom_q", "k": 16, "q": 0.1, "annotator": "policy", "weight": 1.0,
    }  # fmt: skip
    assert certainty["init_args"]["k"] == 4


def test_a_run_with_all_rewards_but_the_annotated(rlif, small_fit, tmp_path):
    """Two steps through the command line; the values that were written down are recomputed from its own rows."""
    shuffled = {"class_path": ROOM + "SelfCertainty"}
    own = recipe(
        tmp_path / "all.yaml",
        *[(r.__name__, {}) for r in (*INTERNAL, MajorityVote, ClusterFrequency, Format, Random, Verifiable)],
        ("Length", {"prefer": "short"}),
        ("TokenEntropy", {"aggregation": "bottom_q"}),
        ("Shuffled", {"reward": shuffled, "weight": [[0, 1.0], [1, 0.0]]}),
    )
    folder = rlif(
        "fit", "--config", own, *small_fit, "--data.answers.completion=([a-z])", "--data.answers.compare=exact"
    )  # fmt: skip
    rows = [json.loads(line) for line in (folder / "runs/all/1/completions.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 2 * 4
    assert {len(r["rewards"]) for r in rows} == {13}
    for i in range(0, len(rows), 4):
        group = rows[i : i + 4]
        answers = [r["answer"] for r in group]
        sizes = Counter(a for a in answers if a is not None)
        shares = [sizes[a] / 4 for a in answers]  # a Counter has none of what it does not know
        assert [r["rewards"]["cluster_frequency"] for r in group] == shares
        assert [r["rewards"]["format"] for r in group] == [float(a is not None) for a in answers]
        if sizes:
            winner = next(a for a in answers if sizes[a] == max(sizes.values()))
            assert [r["rewards"]["majority_vote"] for r in group] == [float(a == winner) for a in answers]
        own, dealt = ([r["rewards"][n] for r in group] for n in ("self_certainty", "shuffled_self_certainty"))
        assert sorted(own) == sorted(dealt)
        for r in group:
            values = r["rewards"]
            assert 1 / 320 <= values["expected_agreement"] <= 1
            assert 0 <= values["probability_margin"] <= 1
            assert values["token_entropy_bottom_q"] <= values["token_entropy"] + 1e-6
    assert any(r["answer"] for r in rows)
