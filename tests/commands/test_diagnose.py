"""``rlif diagnose``: what is measured, the rewards' gradients, the verdict, the command."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from rlif_lightning.diagnosis.association import Estimate
from rlif_lightning.diagnosis.candidates import candidates
from rlif_lightning.diagnosis.details_figure import details_figure
from rlif_lightning.diagnosis.figure import diagnosis_figure, draw_diagnosis
from rlif_lightning.diagnosis.gradients import cosines, gradient_bytes, policy_gradients
from rlif_lightning.diagnosis.measures import (
    compare,
    describe,
    difference,
    length_correlations,
    measure,
    value_correlations,
)
from rlif_lightning.diagnosis.text import report_text
from rlif_lightning.diagnosis.verdict import verdict
from rlif_lightning.functional.loss_records import LossSettings
from rlif_lightning.functional.token_stats import token_stats
from rlif_lightning.main import main
from rlif_lightning.rewards import Reward, SelfCertainty, TokenEntropy
from rlif_lightning.rollout import Rollout, Samples
from rlif_lightning.training.collector import AdvantageSettings

NAN = float("nan")


class Given(Reward):
    """A reward that a test hands over."""

    def __init__(self, values, name="given"):
        super().__init__()
        self.values, self._name = torch.tensor(values), name

    name = property(lambda self: self._name)

    def __call__(self, rollout):
        return self.values


class Table(nn.Module):
    """Logits [V] of every token are a row of weights that the prompt's first token names."""

    def __init__(self, prompts=4, vocab=5):
        super().__init__()
        self.rows = nn.Parameter(torch.randn(prompts, vocab, generator=torch.Generator().manual_seed(0)))
        self.unused = nn.Parameter(torch.zeros(3))

        self.config = SimpleNamespace(get_text_config=SimpleNamespace)

    def get_decoder(self):
        return self

    def get_output_embeddings(self):
        return nn.Identity()

    def get_input_embeddings(self):
        return SimpleNamespace(weight=self.rows.T)

    def forward(self, input_ids, past_key_values=None, **_):
        first = input_ids[:, 0]
        if past_key_values is not None:  # of the prompt, where that was read before
            read, _ = past_key_values.update(*[input_ids[:, None, :, None].float()] * 2, 0)
            first = read[:, 0, 0, 0].long()
        return SimpleNamespace(last_hidden_state=self.rows[first][:, None].expand(-1, input_ids.shape[1], -1))


def make_rollout(prompts=4, group=3, width=4, seed=0, correct=None, votes=None):
    """Completions of random lengths from a table, whose prompt p is the token p twice."""
    generator = torch.Generator().manual_seed(seed)
    n = prompts * group
    ids = torch.randint(0, 5, (n, width), generator=generator)
    lengths = torch.randint(1, width + 1, (n,), generator=generator)
    mask = torch.arange(width) < lengths[:, None]
    first = torch.arange(prompts).repeat_interleave(group)[:, None]
    stats = token_stats(torch.randn(n, width, 5, generator=generator), ids)
    samples = Samples(
        first.expand(-1, 2), torch.ones(n, 2, dtype=torch.bool), ids, mask, lengths < width, stats.logprob, stats
    )
    votes = votes or [[0] * group for _ in range(prompts)]
    answers = [None if v is None else str(v) for own in votes for v in own]
    correct = None if correct is None else torch.tensor(correct)
    return Rollout(samples, group, 1.0, torch.arange(n), [""] * n, answers, correct, votes, loss_mask=mask)


# -- gradients ----------------------------------------------------------------------------------------------


def gradients(advantages, rollout=None, **settings):
    rollout = rollout or make_rollout()
    settings = {"loss": LossSettings(), "max_tokens": 4, "micro_batch_size": None, **settings}
    return policy_gradients(Table(), [rollout], [{k: torch.tensor(v) for k, v in advantages.items()}], **settings)


def test_a_reward_its_double_its_negative_and_one_on_other_weights():
    one = [1.0, -0.5, -0.5] * 2 + [0.0] * 6  # teaches rows 0 and 1 of the table
    other = [0.0] * 6 + [1.0, -0.5, -0.5] * 2  # rows 2 and 3
    both = [a + b for a, b in zip(one, other, strict=True)]
    found = gradients(
        {"one": one, "double": [2 * a for a in one], "minus": [-a for a in one], "other": other, "both": both,
         "none": [0.0] * 12}
    ).sum(0)  # fmt: skip
    angle = cosines(found, found)
    assert angle[0].tolist()[:4] == pytest.approx([1.0, 1.0, -1.0, 0.0], abs=1e-6)
    a, b = found[0].norm(), found[3].norm()
    assert float(angle[0, 4]) == pytest.approx(float(a / (a**2 + b**2).sqrt()), rel=1e-5)
    assert angle[5].isnan().all()


@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo"])
def test_the_gradient_points_where_the_objective_rises(loss):
    """Against autograd through a loop over completions in float64; in slices of any size."""
    rollout = make_rollout()
    advantages = torch.randn(12, generator=torch.Generator().manual_seed(1))
    model = Table().double()
    total, size = 0.0, 0.0
    for i in range(12):
        length = int(rollout.samples.lengths[i])
        log_p = torch.log_softmax(model.rows[i // 3], -1)
        logprobs = sum(log_p[int(t)] for t in rollout.samples.completion_ids[i, :length])
        total = total + advantages[i] * (logprobs / length if loss == "grpo" else logprobs)
        size += {"grpo": 1, "dapo": length, "dr_grpo": 4}[loss]
    (expected,) = torch.autograd.grad(total / size, [model.rows])
    for slices in (None, 1, 5):
        halves = gradients({"a": advantages.tolist()}, rollout, loss=LossSettings(loss), micro_batch_size=slices)
        got = halves.sum(0)[0]
        torch.testing.assert_close(got[:20].view(4, 5), expected.float(), rtol=1e-5, atol=1e-6)
        assert not got[20:].any()
        # Halves are those of prompts 0 and 2, and of 1 and 3.
        assert halves[0, 0, :20].view(4, 5).abs().sum(1).gt(0).tolist() == [True, False, True, False]


def test_memory_is_that_of_two_vectors_per_reward():
    assert gradient_bytes(Table(), 3) == 2 * 3 * 4 * 23


# -- what is measured ---------------------------------------------------------------------------------------


def by_hand():
    """Three prompts x 4: answers a a b none | a b c none (no majority) | b b a a (a tie: the first wins)."""
    votes = [[0, 0, 1, None], [0, 1, 2, None], [0, 0, 1, 1]]
    correct = [1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    rollout = make_rollout(3, 4, correct=correct, votes=votes)
    rewards = [Given([4.0, 3.0, 1.0, 0.0] + [7.0] * 4 + [1.0, 2.0, 5.0, 4.0]), SelfCertainty()]
    return measure([rollout], rewards, AdvantageSettings())[0], rollout


def test_the_policy_by_hand():
    m, rollout = by_hand()
    found = describe(m)
    assert m.agreement.tolist() == [0.5, 0.25, 0.5]
    np.testing.assert_array_equal(m.majority, [[1, 1, 0, 0], [NAN] * 4, [1, 1, 0, 0]])
    assert found["answered_fraction"].value == pytest.approx(10 / 12)
    assert found["accuracy"].value == pytest.approx(5 / 12)
    assert found["maj@4"].value == pytest.approx(1 / 3)  # right, wrong (the first of equals), wrong
    assert found["majority_gain"].value == pytest.approx(1 / 3 - 5 / 12)
    assert found["pass@4"].value == 1.0
    assert found["pass@2"].value == pytest.approx(np.mean([1 - 1 / 6, 1 - 3 / 6, 1 - 1 / 6]))
    s = rollout.samples
    assert found["entropy"].value == pytest.approx(float(s.stats.entropy[s.completion_mask].mean()), rel=1e-6)
    assert found["truncated_fraction"].value == pytest.approx(1 - float(s.ended.float().mean()))


def test_a_reward_by_hand():
    m, _ = by_hand()
    given = compare(m)["given"]
    assert given["gated_fraction"] == pytest.approx(1 / 3)
    # Centred: 2 1 -1 -2 and -2 -1 2 1; majority .5 .5 -.5 -.5 in both; correct the same, then its negative.
    assert given["agreement"]["within"].value == pytest.approx((3 - 3) / math.sqrt(20 * 2))
    assert given["correct"]["within"].value == pytest.approx((3 + 3) / math.sqrt(20 * 2))
    assert given["correct"]["within"].groups == 2
    assert given["correct"]["auroc_within"].value == 1.0
    assert given["agreement"]["auroc_within"].value == 0.5
    assert given["spread"] == pytest.approx(np.mean([np.std([4, 3, 1, 0], ddof=1), 0, np.std([1, 2, 5, 4], ddof=1)]))


def test_cut_off_completions_are_left_out_where_training_leaves_them_out():
    rollout = make_rollout(3, 4, correct=[1.0, 0.0, 1.0, 0.0] * 3)
    seen = [measure([rollout], [SelfCertainty()], AdvantageSettings(mask_truncated=x))[0] for x in (False, True)]
    assert not seen[0].ended.all()
    np.testing.assert_array_equal(np.isnan(seen[1].values["self_certainty"]), ~seen[0].ended)
    assert not np.isnan(seen[0].values["self_certainty"]).any()


def test_rollouts_follow_each_other():
    parts = [make_rollout(2, 3, seed=1), make_rollout(3, 3, seed=2, width=6)]
    rewards = [SelfCertainty(), TokenEntropy()]
    m, masked, advantages = measure(parts, rewards, AdvantageSettings())
    alone = [measure([p], rewards, AdvantageSettings())[0] for p in parts]
    np.testing.assert_array_equal(m.tokens, np.concatenate([a.tokens for a in alone]))
    np.testing.assert_array_equal(
        m.values["token_entropy"], np.concatenate([a.values["token_entropy"] for a in alone])
    )
    assert [len(r.loss_mask) for r in masked] == [6, 9]
    assert [len(a["self_certainty"]) for a in advantages] == [6, 9]


def test_rewards_by_other_annotators_are_the_policys_own_before_training():
    rewards = [SelfCertainty(), SelfCertainty(annotator="reference"), SelfCertainty(annotator="ema")]
    m, _, _ = measure([make_rollout()], rewards, AdvantageSettings())
    own, reference, ema = m.values.values()
    np.testing.assert_array_equal(own, reference)
    np.testing.assert_array_equal(own, ema)


def test_two_rewards_against_each_other():
    generator = np.random.default_rng(0)
    noise = generator.normal(size=(2, 160))
    right = (generator.random(160) < 0.5).astype(float)
    rollout = make_rollout(40, 4, correct=right.tolist())
    close, far = (right + 0.3 * noise[0]).tolist(), (right + 3 * noise[1]).tolist()
    rewards = [
        Given(close, "close"),
        Given(far, "far"),
        Given([-x for x in close], "minus"),
        Given([1.0] * 160, "flat"),
    ]
    m, _, _ = measure([rollout], rewards, AdvantageSettings())
    assert difference(m, "close", "far", "correct").low > 0
    assert not difference(m, "close", "close", "correct").excludes_zero()
    table = value_correlations(m)
    assert table[0, 2] == pytest.approx(-1.0, abs=1e-6)
    assert table.diagonal()[:3].tolist() == pytest.approx([1.0] * 3)
    assert table[3].isnan().all()


def test_all_internal_rewards_the_recipes_and_the_controls_are_compared():
    own = TokenEntropy(aggregation="sum")
    names = [r.name for r in candidates([own, SelfCertainty()], labels=True)]
    assert {"self_certainty", "token_entropy", "trajectory_entropy", own.name, "random", "verifiable"} <= set(names)
    assert len(set(names)) == len(names)
    assert "verifiable" not in [r.name for r in candidates([own], labels=False)]


# -- the verdict --------------------------------------------------------------------------------------------


def about(value, half=0.03, groups=64):
    return Estimate(value, value - half, value + half, groups)


def case(labels=True, fits=None, groups=64, votes=(), differs=lambda *_: True, gated=0.0, gain=0.2, **changes):
    """The verdict on a policy and its rewards.

    ``fits``: reward -> correlation with correctness, and with agreement; ``votes``: rewards made of answers.
    """
    numbers = {"entropy": 0.8, "agreement": 0.4, "answered_fraction": 1.0, "truncated_fraction": 0.0, **changes}
    if labels:
        numbers |= {"accuracy": 0.3, "maj@8": 0.3 + gain, "majority_gain": gain, "pass@8": 0.7}
    policy = {name: about(value, groups=groups) for name, value in numbers.items()}
    rewards = {}
    for name, fit in (fits or {"good": 0.4, "poor": 0.01}).items():
        right, vote = fit if isinstance(fit, tuple) else (fit, fit)
        own = {"agreement": {"within": about(vote, 0.1)}, "tokens": {"within": about(0.0)}, "gated_fraction": gated}
        rewards[name] = own | ({"correct": {"within": about(right, 0.1)}} if labels else {})
    return verdict(policy, rewards, internal={n: n in votes for n in rewards}, group_size=8, differs=differs)


def test_room_and_a_reward_that_goes_with_what_is_right():
    found = case()
    assert (found.level, found.reward, found.against) == ("start", "good", "correct")
    assert "0.40 [0.30, 0.50]" in " ".join(found.reasons)
    assert not found.cautions


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"agreement": 0.97}, "saturated"),
        ({"entropy": 0.01}, "next to none"),
        ({"fits": {"good": -0.3, "poor": -0.2}}, "runs against it"),
        ({"gain": -0.2}, "worse here than a sample"),
    ],
)
def test_what_speaks_against_training(changes, word):
    found = case(**changes)
    assert (found.level, found.reward) == ("don't", None)
    assert word in " ".join(found.reasons)
    assert found.sentence.startswith("Don't train on internal rewards here. ")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"entropy": 0.3}, "entropy 0.30 [0.27, 0.33] nats is low"),
        ({"agreement": 0.72}, "can't be told from 0.7"),
        ({"fits": {"good": 0.05, "poor": 0.01}}, "includes 0"),
        ({"fits": {"good": -0.05, "poor": -0.3}}, "includes 0"),
        ({"gain": 0.01}, "change little"),
        ({"truncated_fraction": 0.5}, "50% of the completions are cut off"),
        ({"answered_fraction": 0.3}, "30% of the completions state an answer"),
        ({"groups": 20}, "only 20 prompts"),
        ({"gated": 0.8}, "80% of the groups"),
    ],
)
def test_what_asks_for_care(changes, word):
    found = case(**changes)
    assert found.level == "try with care"
    assert word in " ".join([*found.reasons, *found.cautions])


def test_an_interval_across_the_landmark_says_neither_low_nor_enough_unless_answers_differ():
    assert case(entropy=0.4).level == "start"  # agreement is clearly below its landmark
    assert case(entropy=0.4, answered_fraction=0.2).level == "try with care"


def test_without_labels_agreement_stands_in_and_a_reward_made_of_it_cannot_win():
    fits = {"good": 0.3, "votes": 1.0}
    assert case(labels=False, fits=fits).reward == "votes"
    found = case(labels=False, fits=fits, votes=("votes",))
    assert (found.level, found.reward, found.against) == ("start", "good", "agreement")
    assert case(fits=fits, votes=("votes",)).reward == "votes"  # labels can speak for it


def test_labels_win_over_agreement():
    """Confident and wrong: a reward may follow the majority and run against the truth."""
    found = case(fits={"good": (0.2, 0.1), "sure": (-0.3, 0.8)})
    assert found.reward == "good"
    assert "sure -0.30" in " ".join(found.notes)


def test_texts_without_answers_leave_nothing_to_hold_rewards_against():
    found = case(labels=False, answered_fraction=0.0)
    assert (found.level, found.reward, found.against) == ("try with care", None, None)


def test_rewards_that_the_data_do_not_tell_apart_are_named():
    found = case(fits={"good": 0.4, "near": 0.35, "far": 0.2}, differs=lambda one, other, target: other == "far")
    assert "not told apart from it: near" in found.reasons


def test_a_control_that_goes_with_correctness_by_chance_is_said():
    assert not case(fits={"good": 0.4, "random": 0.05}).notes
    assert "even the random reward" in " ".join(case(fits={"good": 0.4, "random": 0.2}).notes)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, "Start with good. It is higher for right completions, and there is room to improve."),
        ({"fits": {"self_certainty": 0.4}, "entropy": 0.3}, "Try self-certainty with care. Initial entropy is low."),
        ({"agreement": 0.97}, "Don't train on internal rewards here. The completions of a prompt hardly differ."),
        (
            {"labels": False, "fits": {"good": -0.3}},
            "Don't train on internal rewards here. Every internal reward is higher for the minority's answers.",
        ),
        (
            {"fits": {"good": 0.05}},
            "Try with care. No internal reward is clearly higher for right completions.",
        ),
        ({"groups": 20}, "Try good with care. Only 20 prompts; take 32 or more to be told to start."),
    ],
)
def test_the_verdict_in_plain_words(changes, sentence):
    assert case(**changes).sentence == sentence


# -- the pictures -------------------------------------------------------------------------------------------


def whole_report(groups=40):
    """What the command reports on rewards that go with correctness, by their noise: near, far, and not at all."""
    generator = np.random.default_rng(0)
    right = (generator.random(4 * groups) < 0.5).astype(float)
    noise = {"near_it": 0.5, "self_certainty": 2.0, "random": 1e6}
    rewards = [Given((right + s * generator.normal(size=len(right))).tolist(), name) for name, s in noise.items()]
    flat = Given([0.0] * len(right), "flat")
    rollout = make_rollout(groups, 4, correct=right.tolist(), votes=[[0, 0, 1, 2]] * groups)
    stats, _, _ = measure([rollout], [*rewards, flat], AdvantageSettings())
    policy, found = describe(stats), compare(stats)
    internal = dict.fromkeys(("near_it", "self_certainty", "flat"), False)
    answer = verdict(policy, found, internal=internal, group_size=4, differs=lambda *_: True)
    values = value_correlations(stats).tolist()
    report = {"verdict": asdict(answer), "policy": policy, "rewards": found, "length": length_correlations(stats)}
    report |= {"equivalence": {"values": values, "gradients": None}, "min_spread": 1e-4}
    return report | {"model": "a $model", "split": "train", "prompts": groups, "group_size": 4}, stats


def points(ax):
    """Label of each row of a dot plot: its lines from left to right."""
    lines = [line for line in ax.lines if len(set(line.get_ydata())) == 1]
    labels = {row: label.get_text() for row, label in zip(ax.get_yticks(), ax.get_yticklabels(), strict=True)}
    found = {label: [] for label in labels.values()}
    for line in lines:
        found[labels[line.get_ydata()[0]]].append(tuple(line.get_xdata()))
    return found


@pytest.mark.pictures
def test_the_first_picture_is_the_verdict_and_every_statistic_once(tmp_path):
    report, _ = whole_report()
    answer, policy = report["verdict"], report["policy"]
    figure = diagnosis_figure(report)
    assert figure.get_suptitle().replace("\n", " ") == answer["sentence"]
    assert f"VERDICT: {answer['sentence']}" in report_text(report).replace("\n", " ")
    fits, agreement, entropy = figure.axes
    shown = points(fits)
    words = {"near it": "near_it", "self-certainty": "self_certainty", "random (control)": "random"}
    assert next(iter(shown)) == "near it" and set(shown) == {*words, "flat", "answer length (control)"}
    for label, name in words.items():
        fit = report["rewards"][name]["correct"]["within"]
        assert shown[label] == [(fit.low, fit.high), (fit.value,)]
    length = report["length"]["correct"]
    assert shown["answer length (control)"] == [(length.low, length.high), (length.value,)]
    assert shown["flat"] == [(0.0,)]  # a cross
    (too_few,) = [text for text in fits.texts if "too few" in text.get_text()]
    assert too_few.get_text() == "0 groups: too few" and too_few.xy == (0.0, list(shown).index("flat"))
    bold = [label.get_text() for label in fits.get_yticklabels() if label.get_fontweight() == "bold"]
    assert bold == ["near it"] and answer["reward"] == "near_it"
    for ax, found, zones in (
        (agreement, policy["agreement"], ["room to improve", "little room", "saturated"]),
        (entropy, policy["entropy"], ["room to improve", "low", "next to none"]),
    ):
        *_, bar, dot = ax.lines
        assert (*bar.get_xdata(), *dot.get_xdata()) == (found.low, found.high, found.value)
        assert [text.get_text() for text in ax.texts] == [*zones, str(found)]
    draw_diagnosis(report, tmp_path / "x.png")  # dollars are no formulas


@pytest.mark.pictures
def test_the_details_show_each_reward_under_its_name():
    report, stats = whole_report()
    figure = details_figure(report, stats)
    titles = [ax.get_title() for ax in figure.axes]
    assert titles[4:8] == ["near it", "self-certainty", "random", "flat"]
    assert titles[8:] == ["reward values: correlation within groups"]
    labels = [label.get_text() for label in figure.axes[3].get_yticklabels()]
    assert labels == ["near it\n0% gated", "self-certainty\n0% gated", "random\n0% gated", "flat\n100% gated"]


# -- the command --------------------------------------------------------------------------------------------


def diagnosis(folder):
    return json.loads((Path(folder) / "diagnosis.json").read_text())


def test_the_command_on_a_tiny_model(rlif, small_fit, capsys):
    folder = (
        rlif("diagnose", *small_fit, "--prompts", 9, "--model.gradient_checkpointing=true") / "runs/run/diagnose/1"
    )
    out = capsys.readouterr().out
    assert "VERDICT: " in out
    assert {f.name for f in folder.iterdir()} == {
        "diagnosis.json",
        "diagnosis.png",
        "diagnosis-details.png",
        "completions.jsonl",
        "config.yaml",
    }
    report = diagnosis(folder)
    names = ["self_certainty", "token_entropy", "trajectory_entropy", "random", "verifiable"]
    assert set(names) <= set(report["rewards"])
    assert (report["prompts"], report["group_size"]) == (9, 4)
    rows = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    assert len(rows) == 36
    assert report["policy"]["accuracy"]["value"] == pytest.approx(np.mean([r["correct"] for r in rows]))
    tokens = [r["tokens"] for r in rows]
    entropy = np.average([r["entropy"] for r in rows], weights=tokens)
    assert report["policy"]["entropy"]["value"] == pytest.approx(entropy, rel=1e-6)
    own = [[r["rewards"]["token_entropy"] for r in rows[i : i + 4]] for i in range(0, 36, 4)]
    spread = np.mean([np.std(g, ddof=1) for g in own])
    assert report["rewards"]["token_entropy"]["spread"] == pytest.approx(spread, rel=1e-6)
    gradients = np.array(report["equivalence"]["gradients"]["cosines"], dtype=float)
    assert gradients[0, 0] == pytest.approx(1.0, abs=1e-5)
    for name in ("diagnosis.png", "diagnosis-details.png"):
        assert name in out and (folder / name).read_bytes().startswith(b"\x89PNG")
    # The same words give the same numbers; a whole config.yaml is a recipe.
    rlif("diagnose", "--config", folder / "config.yaml", "--output", "again", "--gradients", "false")
    again = diagnosis("again")
    assert again["policy"] == report["policy"]
    assert again["rewards"] == report["rewards"]
    assert again["equivalence"]["gradients"] is None


def test_without_labels_and_with_lora(rlif, small_fit, capsys):
    args = [a for a in small_fit if "####" not in a and "[#]{4}" not in a and a != "--data.train.gold"]
    rlif("diagnose", *args, "--data.train.answer=null", "--prompts=8", "--output=out",
         "--model.lora={r: 2, target_modules: all-linear}", "--trainer.precision=bf16-mixed",
         "--rollout.rewards=[TokenEntropy]", "--rollout.rewards.aggregation=sum",
         "--rollout.micro_batch_size=2", "--rollout.mask_truncated=true")  # fmt: skip
    report = diagnosis("out")
    assert "token_entropy_sum" in report["rewards"]
    assert "verifiable" not in report["rewards"]
    assert "accuracy" not in report["policy"]
    assert report["verdict"]["level"] in ("try with care", "don't")
    out = capsys.readouterr().out
    assert "with agreement" in out
    assert "with correctness" not in out


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--prompts=41"], ["fewer prompts", "40 prompts", "--prompts 40"]),
        (["--prompts=1"], ["--prompts is too small", "2 or more"]),
        (["--rollout.group_size=1"], ["group_size is too small"]),
        (["--rollout.temperature=0"], ["rollout.temperature is out of range", "teaches nothing"]),
        (["--split=val"], ["data.val is empty"]),
        (["--split=vall"], ["split can't be 'vall'", "did you mean val?"]),
        (["--data.train.path=nosuch.jsonl"], ["does not exist"]),
        (["--prompt=4"], ["'--prompt'", "--prompts?"]),
    ],
)
def test_mistakes_are_answered_before_weights_are_loaded(args, parts, small_fit, capsys, monkeypatch, tmp_path):
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(SystemExit) as exit_:
        main(["diagnose", *small_fit, *args])
    err = capsys.readouterr().err
    assert exit_.value.code == 2
    message = err[err.rindex("error: ") :]
    assert all(part in message for part in parts), message
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_the_toy_is_told_to_start_and_its_tuned_variant_not_to(rlif, capsys):
    rlif("diagnose", "--config", "quickstart", "--output", "base")
    base = diagnosis("base")
    chosen = "".join(word.capitalize() for word in base["verdict"]["reward"].split("_"))
    assert f"Next: rlif fit with the same recipes and --rollout.rewards {chosen}\n" in capsys.readouterr().out
    assert (base["verdict"]["level"], base["verdict"]["against"]) == ("start", "correct")
    chosen = base["rewards"][base["verdict"]["reward"]]
    assert chosen["correct"]["within"]["low"] > 0.3
    assert chosen["correct"]["auroc_within"]["value"] > 0.8
    names = base["equivalence"]["rewards"]
    angle = {
        n: dict(zip(names, row, strict=True))
        for n, row in zip(names, base["equivalence"]["gradients"]["cosines"], strict=True)
    }
    assert angle["self_certainty"]["token_entropy"] > 0.8
    assert angle["self_certainty"]["verifiable"] > 0.8
    assert abs(angle["self_certainty"]["random"]) < 0.5
    rlif("diagnose", "--config", "quickstart", "--model.name", "toy-tuned", "--output", "tuned", "--gradients=false")
    tuned = diagnosis("tuned")
    assert tuned["verdict"]["level"] == "don't"
    assert tuned["policy"]["agreement"]["low"] > 0.9
    assert tuned["policy"]["entropy"]["high"] < 0.05
