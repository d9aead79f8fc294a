"""Numbers that go wrong: gradients, weights and settings that are not finite, rewards, nothing to learn from."""

import copy
import json
import math
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback

from rlif_lightning.callbacks import rollout as rollout_callback
from rlif_lightning.data.problems import Problem
from rlif_lightning.data.prompts import Prompt
from rlif_lightning.errors import UserError, check_numbers, check_ranges
from rlif_lightning.models.checkpoints import read_checkpoint
from rlif_lightning.rewards import Random, Reward, SelfCertainty
from rlif_lightning.rollout import Rollout, Samples
from rlif_lightning.runs.metrics_csv import read_metrics
from rlif_lightning.training.cut_off import mostly_cut_off
from rlif_lightning.training.learning_check import LearningCheck
from rlif_lightning.training.module import RLIFModule
from rlif_lightning.training.rewarding import AdvantageSettings, with_advantages
from tests.short_runs import fit

# -- steps without a finite gradient ---------------------------------------------------------------------------


@pytest.fixture
def poison(monkeypatch):
    """``poison(3, 4)``: one number of the gradient of these steps, counted from 0, is not finite."""

    def at(*steps, value=math.nan):
        def spoilt(self, loss, *args, **kwargs):
            backward(self, loss, *args, **kwargs)
            if self.trainer.global_step in steps:
                next(p for p in self.parameters() if p.grad is not None).grad.view(-1)[5] = value

        monkeypatch.setattr(RLIFModule, "backward", spoilt)

    backward = RLIFModule.backward
    return at


class States(Callback):
    """Weights, optimiser and schedule after each step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        weights = {n: p.detach().clone() for n, p in pl_module.named_parameters() if p.requires_grad}
        state = copy.deepcopy(trainer.optimizers[0].state_dict()["state"])
        self.seen.append((weights, state, trainer.lr_scheduler_configs[0].scheduler.last_epoch))


def rows_of(name):
    """The lines of a file of the first run."""
    return [json.loads(line) for line in Path("runs/run/1", name).read_text().splitlines()]


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30], ids=str)
def test_a_step_without_a_finite_gradient_changes_nothing(model_folder, problems_file, poison, value):
    """1e30 is finite, its square is not: clipping by an infinite norm would make every update 0."""
    poison(1, value=value)
    states = States()
    with pytest.warns(match=r"skipped, because the norm of its gradient is (nan|inf); the weights stay") as said:
        run = fit(model_folder(), problems_file, callbacks=[states], steps=3)
    assert sum("skipped" in str(w.message) for w in said) == 1
    (first, moments, _), (second, kept, place), (third, moved, _) = states.seen
    assert same(first, second) and same(moments, kept) and not same(second, third) and not same(kept, moved)
    assert place == 2  # the schedule goes on
    assert run.column("train/skipped_steps") == [0, 1, 1] and run.column("rollout/unscored_fraction") == [0] * 3
    assert [math.isfinite(x) for x in run.column("train/grad_norm")] == [True, False, True]
    assert run.column("train/learning_rate") == [1e-3] * 3


def test_three_in_a_row_end_the_run(rlif, small_fit, capsys):
    """A KL term that is 0 at the first step and overflows at the second."""
    settings = ["--model.kl_coefficient=1e30", "--trainer.max_steps=9", "--checkpoint.every=1"]
    with pytest.raises(SystemExit) as exit_:
        rlif("fit", *small_fit, *settings)
    run, error = "runs/run/1/", capsys.readouterr().err
    assert exit_.value.code == 2 and "Traceback" not in error
    assert (
        "error: 3 steps in a row had a gradient that is not finite" in error and "lower model.optimizer.lr" in error
    )
    metrics = read_metrics(f"{run}metrics.csv")
    assert metrics["train/skipped_steps"] == {0: 0, 1: 1, 2: 2, 3: 3}
    saved = read_checkpoint(f"{run}checkpoints/last.ckpt")
    assert saved["global_step"] == 3 and all(w.isfinite().all() for w in saved["state_dict"].values())
    rows = rows_of("skipped.jsonl")
    assert [row["step"] for row in rows] == [1] * 8 + [2] * 8 + [3] * 8
    assert rows[0].keys() >= {"prompt", "completion", "rewards", "advantage"}
    # A step is a whole rollout here, and the file holds 32 of its completions at most.
    assert rows == [row for row in rows_of("completions.jsonl") if row["step"]]


def test_only_those_of_the_step_and_of_the_first_steps_are_kept(rlif, small_fit, poison, monkeypatch):
    monkeypatch.setattr(rollout_callback, "SKIPPED_STEPS", 1)
    poison(1, 3)
    rlif("fit", *small_fit, "--rollout.steps_per_rollout=2", "--trainer.max_steps=4")
    skipped, kept = rows_of("skipped.jsonl"), rows_of("completions.jsonl")
    assert len(skipped) == 8 and {row["step"] for row in skipped} == {1}
    texts = [row["completion"] for row in kept if row["step"] == 0]
    assert len(texts) == 16 and {row["completion"] for row in skipped} <= set(texts)


def test_weights_that_are_not_finite_are_not_saved(rlif, small_fit, capsys, monkeypatch):
    step = RLIFModule.optimizer_step

    def spoilt(self, *args, **kwargs):
        step(self, *args, **kwargs)
        if self.trainer.global_step == 2:
            self.policy.model.get_input_embeddings().weight.data[0, 0] = math.inf

    monkeypatch.setattr(RLIFModule, "optimizer_step", spoilt)
    with pytest.raises(SystemExit):
        rlif("fit", *small_fit, "--checkpoint.every=1", "--trainer.max_steps=4")
    error = capsys.readouterr().err
    assert "error: The weights after step 3 are not finite, so they are not saved" in error
    assert "embed_tokens.weight" in error and "--ckpt_path last" in error
    folder = {
        p.name: read_checkpoint(p)["global_step"]
        for p in (rlif("--version") / "runs/run/1/checkpoints").glob("*.ckpt")
    }
    assert folder == {"last.ckpt": 2, "step=2.ckpt": 2, "step=1.ckpt": 1}  # and the one before the newest


# -- settings --------------------------------------------------------------------------------------------------


def test_every_number_of_the_settings_is_looked_at():
    check_numbers({"a": 1, "b": {"c": [1.0, "nan", None]}, "d": True})
    for bad in ({"a": {"b": math.nan}}, {"a": {"b": [[0, 1.0], [5, -math.inf]]}}):
        with pytest.raises(UserError, match=r"^a\.b is out of range\n  got: -?(nan|inf)"):
            check_numbers(bad)
    with pytest.raises(UserError, match=r"rollout\.x is out of range"):
        check_ranges("rollout", ("x", math.inf, True, "0 or more"))
    for weight in (math.nan, -math.inf, 1e16, [(0, 1.0), (5, math.nan)]):
        with pytest.raises(UserError, match="weight of a reward"):
            Random(weight=weight)


# -- rewards ---------------------------------------------------------------------------------------------------


class Odd(Reward):
    """Something is wrong with it."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def __call__(self, rollout):
        return self.change(rollout.samples.lengths.float())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: torch.where(torch.arange(4) % 2 == 0, 3e38, -3e38), r"too large .* in float32\n  got: 3e\+38"),
        (lambda x: (x + torch.arange(4)) * 1e37, "too large to compare"),
        (lambda x: x.double() * 1e300, "too large to compare"),
        (lambda x: x.to(torch.complex64), r"one number per completion\n  got: a tensor .* torch.complex64"),
        (lambda x: x.to("meta"), r"one number per completion\n  got: a tensor .* on meta"),
    ],
)  # fmt: skip
def test_rewards_that_no_float32_compares_are_named(change, said):
    mask = torch.ones(4, 2, dtype=torch.bool)
    rollout = Rollout(Samples(mask.long(), mask, mask.long(), mask, mask[:, 0]), 4, 1.0, torch.arange(4))
    with pytest.raises(UserError, match=rf"The reward \S*\.Odd .*{said}"):
        with_advantages(rollout, [Odd(change)], [1.0], AdvantageSettings())
    for fine in (lambda x: x > 1, lambda x: x.long(), lambda x: x.half(), lambda x: x * 1e14):
        with_advantages(rollout, [Odd(fine)], [1.0], AdvantageSettings())


@pytest.mark.parametrize("missing", [math.nan, math.inf])
def test_completions_that_a_reward_leaves_out_are_counted(model_folder, problems_file, missing):
    """The mean is that of the others; a reward that scores them all does not hide it."""
    values = [3.0, missing, 5.0, 7.0, missing, missing, 1.0, 9.0]
    some = Odd(lambda x: torch.tensor(values))
    run = fit(model_folder(), problems_file, rollout={"rewards": [some, Random(weight=0.0)]}, steps=1)
    assert run.column("rollout/unscored_fraction") == [3 / 8]
    assert run.column("rollout/reward") == [5.0]
    run = fit(model_folder(), problems_file, rollout={"rewards": [some, SelfCertainty()]}, steps=1)
    assert run.column("rollout/unscored_fraction") == [3 / 8]


# -- nothing to learn from -------------------------------------------------------------------------------------

NOTHING = {
    "rollout/advantage_size": 0.0, "rollout/gated_fraction": 1.0, "rollout/truncated_fraction": 0.0,
    "rollout/unscored_fraction": 0.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "metrics", "weights", "said"),
    [
        ({}, {}, [1.0], "equal by now; .* lower model.optimizer.lr"),
        ({}, {}, [0.0, 0.0], "weight 0"),
        ({"min_spread": 0.5}, {}, [1.0], "rollout.min_spread 0.5; lower it"),
        ({"mask_truncated": True}, {"rollout/truncated_fraction": 0.9}, [1.0], "90% .* raise rollout.max_new_tokens"),
        ({"agreement_band": (0.0, 0.1)}, {"rollout/filtered_fraction": 1.0}, [1.0], "rollout.agreement_band; widen"),
        ({}, {"rollout/unscored_fraction": 1.0}, [1.0], "scored no completion"),
        ({}, {"rollout/gated_fraction": 0.5}, [1.0, -1.0], "cancel"),
    ],
)
def test_rollouts_that_teach_nothing_are_said_once(settings, metrics, weights, said):
    check, found = LearningCheck(AdvantageSettings(**settings), abstains=True), []
    for size in (0.0, 0.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.5, 0.0, 0.0, 0.0):
        found.append(check.after_rollout({**NOTHING, **metrics, "rollout/advantage_size": size}, weights))
    assert [bool(text) for text in found] == [False] * 5 + [True] + [False] * 5
    assert re.fullmatch(f"3 rollouts in a row taught nothing: .*{said}.*", found[5])


def test_rewards_that_were_equal_from_the_start_are_told_apart():
    check = LearningCheck(AdvantageSettings())
    *_, said = [check.after_rollout(NOTHING, [1.0]) for _ in range(3)]
    assert said is not None and "equal; raise rollout.temperature" in said


def test_completions_without_a_reward_are_said_once_where_no_reward_abstains():
    some = {**NOTHING, "rollout/advantage_size": 0.5, "rollout/unscored_fraction": 0.25}
    check = LearningCheck(AdvantageSettings())
    first, *others = [check.after_rollout(some, [1.0]) for _ in range(3)]
    assert first is not None and "no finite number for 25% of the completions" in first and others == [None, None]
    assert LearningCheck(AdvantageSettings(), abstains=True).after_rollout(some, [1.0]) is None


def test_steps_that_change_nothing_are_said_once():
    check = LearningCheck(AdvantageSettings())
    idle, good = ({"train/grad_norm": x, "train/clip_fraction": 1.0} for x in (0.0, 0.3))
    found = [check.after_step(x) for x in (idle, idle, good, idle, idle, idle, idle)]
    assert [bool(text) for text in found] == [False] * 5 + [True, False]
    assert found[5] is not None and re.search("3 steps in a row changed nothing: .*model.clip_high", found[5])
    check = LearningCheck(AdvantageSettings())  # where a rollout taught nothing, that alone is said
    assert [bool(check.after_rollout(NOTHING, [1.0])) or check.after_step(idle) for _ in range(4)] == [
        None, None, True, None
    ]  # fmt: skip


def test_a_run_that_learns_nothing_says_so(rlif, small_fit, capsys):
    """Completions of one token have one length, and all are cut off."""
    more = ["--rollout.max_new_tokens=1", "--rollout.rewards=[Length]", "--rollout.rewards.prefer=long"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rlif("fit", *small_fit, *more, "--trainer.max_steps=4", "--model.kl_coefficient=0")
    said = [str(w.message) for w in caught]
    (cut,) = [i for i, text in enumerate(said) if re.search("100% of the completions were cut off at 1 tokens", text)]
    (idle,) = [i for i, text in enumerate(said) if "3 rollouts in a row taught nothing: all rewards" in text]
    assert cut < idle and not any("changed nothing" in text for text in said)
    summary = Path("runs/run/1/summary.txt").read_text()
    assert "4 of 4 rollouts taught nothing" in summary and "4 of 4 steps changed nothing" in summary


def cut_off(texts, ids, ended=(), group=2, template="Question: {}\nAnswer:"):
    """What is said where these completions were cut off, all but some, of prompts with 20 and 21 in them."""
    ids = torch.tensor(ids)
    samples = Samples(ids, ids > 0, ids, ids > 0, torch.tensor([i in ended for i in range(len(ids))]))
    rollout = Rollout(samples, group, 1.0, torch.arange(len(ids)), texts=texts)
    token = {7: ("<|im_end|>", True), 4: ("word", False), 5: ("</s>", True), 8: ("<pad>", True)}
    added = {i: SimpleNamespace(content=text, special=special) for i, (text, special) in token.items()}
    policy = SimpleNamespace(tokenizer=SimpleNamespace(added_tokens_decoder=added), end_ids=(5,))
    problems = [f"What is {n} + 1?" for n in range(20, 20 + len(ids) // group)]
    prompts = [Prompt(template.format(text), (1,), Problem(text, None)) for text in problems]
    assert mostly_cut_off(0.5, rollout, prompts, policy, 3) is None
    said = mostly_cut_off(0.75, rollout, prompts, policy, 3)
    start = "75% of the completions were cut off at 3 tokens; "
    assert said.startswith(start)
    return said.removeprefix(start).removesuffix("raise rollout.max_new_tokens.")


def test_cut_off_completions_say_what_would_end_them():
    """What most of them hold: a special token that ends nothing, or the next question; else there is no hint."""
    end, other = [4, 7, 5], [4, 9, 9]
    token = 'add "<|im_end|>" to model.end_tokens, which {} of these hold, or '
    question = r'add "\nQuestion:" to rollout.stop, which {} of these hold, or '
    assert cut_off(["", ""], [end, end]) == token.format("100%")
    assert cut_off(["", "", "", ""], [end, other, end, end]) == token.format("75%")
    assert cut_off(["", ""], [end, other]) == ""  # half of them is not most
    assert cut_off(["", "", "", ""], [end, other, end, other], ended={1}) == token.format("67%")
    more = " 21\n\nQuestion: What is 3 + 4?\nAnswer: 7"
    assert cut_off([more, more], [other, other]) == question.format("100%")
    assert cut_off([more, more, more, "21"], [other] * 4) == question.format("75%")
    assert cut_off([more, "Question:", more, "Answer:"], [other] * 4) == ""
    assert cut_off([more, more], [other, other], template="{}") == ""
    few = "Question: 1 + 1?\nAnswer: 2\n\nQ: {} \nA:"
    assert "Question" not in cut_off([more, more], [other, other], template=few)
    assert cut_off(["21\nQ: 3"] * 2, [other, other], template=few).startswith(r'add "\nQ:" to rollout.stop')
    hostile = "\x1b[2J {}"
    assert "\x1b" not in cut_off(["\n\x1b[2J"] * 2, [other, other], template=hostile)
