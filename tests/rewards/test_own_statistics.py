"""A reward of the user's own on the next-token distribution: values, cost, names, mistakes, and the command line."""

import itertools
import json
import math

import pytest
import torch
from torch import Tensor

from rlif_lightning.errors import UserError
from rlif_lightning.functional.chunked import LinearHead
from rlif_lightning.rewards import InternalReward, SelfCertainty, Shuffled, TokenEntropy, TrajectoryEntropy
from rlif_lightning.rewards.base import statistics_of
from rlif_lightning.rollout import Rollout
from rlif_lightning.sampling import NativeSampler, Sampling
from rlif_lightning.training.scores import with_scores
from tests.conftest import make_model
from tests.rewards.own_rewards import FILES, LOOPS, load, write
from tests.sampling.test_engine import Engine
from tests.short_runs import fit

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12]]
PLACES = ["sampler", "scoring pass"]


def sampled(model, rewards, place="sampler", temperature=0.7, **settings):
    """A rollout that holds the rewards' statistics: taken as tokens are drawn, or after another engine drew them."""
    sampler = NativeSampler() if place == "sampler" else Engine()
    sampler.update(model, range(0, 320, 15), 0)
    sampling = Sampling(12, temperature, statistics=statistics_of(rewards), **settings)
    samples = sampler.sample(PROMPTS, 4, torch.arange(8), sampling)
    with torch.no_grad():
        return with_scores(Rollout(samples, 4, temperature, torch.arange(8)), model, sampling)


def by_loop(name, model, rollout, temperature):
    """The statistic of each token, a list per completion: plain forwards, then loops over Python floats."""
    model, samples, found = model.double(), rollout.samples, []
    for i, n in enumerate(samples.lengths.tolist()):
        prompt = samples.prompt_ids[i][samples.prompt_mask[i]]
        ids = torch.cat([prompt, samples.completion_ids[i, :n]])[None]
        with torch.no_grad():
            rows = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].tolist()
        e = [[math.exp((z - max(row)) / temperature) for z in row] for row in rows]
        found.append([LOOPS[name]([x / math.fsum(row) for x in row]) for row in e])
    model.float()
    return found


def aggregated(values, aggregation):
    if aggregation == "last_k":
        values = values[-3:]
    if aggregation == "bottom_q":
        values = sorted(values)[: math.ceil(0.4 * len(values))]
    return sum(values) / (1 if aggregation == "sum" else len(values))


@pytest.mark.parametrize("name", FILES)
def test_a_file_has_at_most_12_lines(tmp_path, name):
    assert len(write(tmp_path, name).read_text().splitlines()) <= 12


@pytest.mark.parametrize("wanted", [None, 1.3])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", FILES)
def test_the_value_is_that_of_a_float64_loop(tmp_path, name, place, wanted):
    model, reward = make_model(), load(tmp_path, name)()
    rollout = sampled(model, [reward, SelfCertainty()], place, statistics_temperature=wanted)
    assert rollout.samples.lengths.unique().numel() > 1
    tokens = by_loop(name, model, rollout, wanted or 0.7)
    for aggregation in ("mean", "sum", "last_k", "bottom_q"):
        reward.aggregation, reward.window = aggregation, (3, 0.4)
        want = torch.tensor([aggregated(row, aggregation) for row in tokens])
        torch.testing.assert_close(reward(rollout), want, atol=2e-5, rtol=1e-5)


def test_filtered_and_ruled_out_tokens_have_their_own_statistics(tmp_path):
    """Those of the whole distribution under a filter; and of one with logits of -inf, off the sampler's fast path."""
    gini = load(tmp_path, "Gini")()
    model = make_model()
    rollout = sampled(model, [gini], top_k=3, temperature=1.0)
    want = torch.tensor([sum(row) / len(row) for row in by_loop("Gini", model, rollout, 1.0)])
    torch.testing.assert_close(gini(rollout), want, atol=2e-5, rtol=1e-5)
    head = torch.nn.Linear(model.config.hidden_size, 320)
    head.bias.data[7:] = -torch.inf  # 7 tokens are left
    model.lm_head = head
    short = sampled(model, [gini]).samples
    assert (short.completion_ids < 7).all()
    values = short.stats.own[gini._statistic_name][short.completion_mask]
    assert (values > 1 - 7 / 320).all() and (values < 1).all()


@pytest.mark.parametrize("place", PLACES)
def test_it_costs_no_forward(tmp_path, monkeypatch, place):
    """Neither a further pass through the layers, nor one through the head."""
    model, counts = make_model(), []
    model.model.layers[0].mlp.register_forward_hook(lambda *_: counts.append("layer"))
    head = LinearHead.__call__
    monkeypatch.setattr(LinearHead, "__call__", lambda self, h: (counts.append("head"), head(self, h))[1])
    found = []
    for rewards in ([SelfCertainty()], [SelfCertainty(), load(tmp_path, "Gini")()]):
        counts.clear()
        sampled(model, rewards, place)
        found.append((counts.count("layer"), counts.count("head")))
    assert found[0] == found[1] and min(found[0]) > 0


@pytest.mark.parametrize("place", PLACES)
def test_it_sees_a_few_rows_at_a_time(monkeypatch, place):
    seen = []

    class Counted(InternalReward):
        def statistic(self, logp: Tensor) -> Tensor:
            seen.append(len(logp))
            return logp.amax(-1)

    model, reward = make_model(), Counted()
    whole = reward(sampled(model, [reward], place))
    assert max(seen) > 3
    for room in ("sampling.native", "models.scoring"):
        monkeypatch.setattr(f"rlif_lightning.{room}.chunk_rows", lambda vocabulary: 3)
    seen.clear()
    torch.testing.assert_close(reward(sampled(model, [reward], place)), whole)
    assert max(seen) == 3


def test_the_usual_statistics_and_the_completions_stay_as_they_are(tmp_path):
    model = make_model()
    alone, beside = (sampled(model, rewards).samples for rewards in ([], [load(tmp_path, "Gini")()]))
    assert torch.equal(alone.completion_ids, beside.completion_ids) and torch.equal(alone.logprob, beside.logprob)
    for mine, other in zip(alone.stats[:3], beside.stats[:3], strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)
    assert len(beside.stats.own) == 1 and not alone.stats.own


# -- names ------------------------------------------------------------------------------------------------------


def test_statistics_are_told_apart_by_class_path_and_settings(tmp_path):
    mine, theirs = (load(tmp_path, "Gini", module) for module in ("my_rewards", "their_rewards"))
    found = statistics_of([mine(), mine("sum", k=3, q=0.1, weight=-1.0), theirs(), Shuffled(mine())])
    assert list(found) == ["my_rewards.Gini", "their_rewards.Gini"]
    top = load(tmp_path, "TopMass")
    model, rewards = make_model(), [top(2), top(5), top(5, "sum")]
    rollout = sampled(model, rewards)
    assert len(rollout.samples.stats.own) == 2
    assert (rewards[0](rollout) < rewards[1](rollout)).all()


# -- training ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", [NativeSampler, Engine])
def test_it_trains_with_every_annotator(tmp_path, model_folder, problems_file, sampler):
    gini = load(tmp_path, "Gini")
    rewards = [gini(), gini("bottom_q", annotator="reference"), gini(annotator="ema")]
    run = fit(
        model_folder(), problems_file, rollout={"rewards": rewards, "sampler": sampler(), "micro_batch_size": 4},
        model={"ema_decay": 0.5},
    )  # fmt: skip
    last = run.rollouts[-1]
    assert list(last.rewards) == ["gini", "gini_bottom_q_reference", "gini_ema"]
    assert not torch.equal(last.rewards["gini"], last.rewards["gini_ema"])
    start = by_loop("Gini", run.start.eval(), last, 1.0)
    own = last.annotations["reference"].own["my_rewards.Gini"][last.samples.completion_mask]
    torch.testing.assert_close(own, torch.tensor(list(itertools.chain(*start))), atol=2e-5, rtol=1e-5)


class Wrong(InternalReward):
    """A mistake in a statistic."""

    def __init__(self, value) -> None:
        super().__init__()
        self.value = value

    def statistic(self, logp: Tensor) -> Tensor:
        return self.value(logp)


MISTAKES = {
    "shape": (
        lambda logp: logp,
        r"must be one number per token.*got: \[\d+, 320\].*expected: a floating-point tensor",
    ),
    "whole numbers": (lambda logp: logp.argmax(-1), r"must be one number per token.*torch\.int64"),
    "float": (lambda logp: 0.5, "must be one number per token.*got: float"),
    "in place": (lambda logp: logp.exp_().amax(-1), "writes into the log-probabilities, which others read"),
    "nan": (lambda logp: logp.amax(-1).log(), r"is not a number for some tokens.*nan for \d+ of \d+ tokens"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_said_before_the_first_update(model_folder, problems_file, monkeypatch, mistake):
    value, told = MISTAKES[mistake]
    steps = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_, **__: steps.append(1))
    with pytest.raises(UserError, match=rf"(?s)reward .*test_own_statistics\.Wrong .*{told}"):
        fit(model_folder(), problems_file, rollout={"rewards": [Wrong(value)]})
    assert not steps


@pytest.mark.parametrize("base", [SelfCertainty, TokenEntropy, TrajectoryEntropy])
def test_a_statistic_that_a_shipped_reward_would_ignore_is_refused(base):
    class Renamed(base):
        pass

    assert Renamed().name == "renamed"
    with pytest.raises(UserError, match=r"Overridden has a statistic.*\n.*derive it from .*InternalReward"):
        type("Overridden", (base,), {"statistic": lambda self, logp: logp.amax(-1)})


# -- the command line -------------------------------------------------------------------------------------------


def test_fit_from_the_users_own_file(rlif, tmp_path):
    write(tmp_path, "Gini", "own_gini")
    rlif(
        "fit", "--config", "quickstart", "--rollout.rewards", "own_gini.Gini", "--trainer.max_steps=2",
        "--evaluation.n=8", "--trainer.enable_progress_bar=false",
    )  # fmt: skip
    rows = [json.loads(x) for x in (tmp_path / "runs/quickstart/1/completions.jsonl").read_text().splitlines()]
    values = [row["rewards"]["gini"] for row in rows]
    assert len(rows) == 64 and 0.5 < min(values) < max(values) < 1


def test_diagnose_measures_it(rlif, small_fit, tmp_path):
    write(tmp_path, "TopMass", "own_masses")
    reward = {"class_path": "own_masses.TopMass", "init_args": {"tokens": 5}}
    rlif("diagnose", *small_fit, f"--rollout.rewards={json.dumps([reward])}", "--prompts=4", "--output=out")
    report = json.loads((tmp_path / "out" / "diagnosis.json").read_text())
    assert {"top_mass", "self_certainty", "expected_agreement", "majority_vote"} <= report["rewards"].keys()
    assert 5 / 320 < report["rewards"]["top_mass"]["mean"] < 1
