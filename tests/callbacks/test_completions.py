"""completions.jsonl and its pictures in TensorBoard."""

import html
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlif_lightning.callbacks import Completions
from rlif_lightning.callbacks.completions import _markdown, completion_row
from rlif_lightning.data.problems import Problem
from rlif_lightning.data.prompts import Prompt
from rlif_lightning.errors import UserError
from rlif_lightning.functional.token_stats import TokenStats
from rlif_lightning.grading import Gold
from rlif_lightning.rollout import Rollout, Samples
from rlif_lightning.runs.held_out import answers_table
from rlif_lightning.runs.markdown import plain
from tests.events import events, scalars, texts


def rows(path):
    """Strict JSON: NaN and Infinity are refused."""

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in Path(path).read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory, model_folder, problems_file):
    """A fit of three steps with two rewards, one of them the label."""
    import os

    from rlif_lightning.main import main

    folder = tmp_path_factory.mktemp("completions")
    old = os.getcwd()
    os.chdir(folder)
    try:
        main([
            "fit", "--model.name", str(model_folder()), "--model.optimizer=torch.optim.AdamW",
            "--data.train.path", str(problems_file), "--data.train.gold", r"[#]{4}\s*(.+)",
            "--data.answers.completion=last_number", "--data.template={prompt} ",
            "--rollout.prompts_per_step=2", "--rollout.group_size=4", "--rollout.max_new_tokens=8",
            "--rollout.rewards=[SelfCertainty, Random]", "--trainer.max_steps=3", "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false",
        ])  # fmt: skip
    finally:
        os.chdir(old)
    return folder / "runs/run/1"


def test_every_completion_is_a_row(run, problems_file):
    found = rows(run / "completions.jsonl")
    assert [r["step"] for r in found] == [0] * 8 + [1] * 8 + [2] * 8
    problems = {
        json.loads(line)["question"] + " ": json.loads(line) for line in problems_file.read_text().splitlines()
    }
    for row in found:
        assert set(row) == {
            "step", "prompt", "completion", "tokens", "ended", "rewards", "advantage", "answer", "gold", "correct",
        }  # fmt: skip
        assert row["prompt"] in problems
        assert row["gold"] == problems[row["prompt"]]["answer"].split("#### ")[1]
        assert set(row["rewards"]) == {"self_certainty", "random"}
        assert 1 <= row["tokens"] <= 8
        assert isinstance(row["completion"], str)
        assert isinstance(row["correct"], bool)
    for start in range(0, 24, 4):
        group = found[start : start + 4]
        assert len({r["prompt"] for r in group}) == 1
        assert sum(r["advantage"] for r in group) == pytest.approx(0, abs=1e-4)


def test_the_rows_explain_their_advantages(run):
    """Each reward standardised in its group, then summed: what the file holds is enough to see it."""
    found = rows(run / "completions.jsonl")
    for start in range(0, 24, 4):
        group = found[start : start + 4]
        total = torch.zeros(4, dtype=torch.float64)
        for name in ("self_certainty", "random"):
            values = torch.tensor([r["rewards"][name] for r in group], dtype=torch.float64)
            total += (values - values.mean()) / (values.std() + 1e-4)
        assert [r["advantage"] for r in group] == pytest.approx(total.tolist(), rel=1e-3, abs=1e-4)


def test_the_first_group_is_a_table_in_tensorboard(run):
    """Four texts a rollout filled two screens, and no reader could compare them."""
    shown = texts(run, "samples/rollout")
    assert list(shown) == [0, 1, 2]
    first = rows(run / "completions.jsonl")[:4]
    prompt, answer, table = shown[0].split("\n\n")
    assert html.unescape(prompt) == f"prompt: {first[0]['prompt'].strip()}"
    assert answer == f"right answer: {first[0]['gold']}"
    head, _, *lines = [line.strip("| ").split(" | ") for line in html.unescape(table).splitlines()]
    assert head == ["self_certainty", "random", "advantage", "tokens", "completion"]
    for row, (mark, *cells) in zip(first, lines, strict=True):
        assert mark == ("✅" if row["correct"] else "❌")
        rewards = [f"{row['rewards'][name]:.4f}" for name in ("self_certainty", "random")]
        assert cells[:4] == [*rewards, f"{row['advantage']:+.3f}", str(row["tokens"])]


def test_distributions_are_histograms(run):
    found = events(run)
    names = ("reward/self_certainty", "reward/random", "advantage", "completion_tokens", "entropy")
    assert {f"distribution/{n}" for n in names} <= set(found.Tags()["histograms"])
    histogram = found.Histograms("distribution/advantage")
    assert [h.step for h in histogram] == [0, 1, 2]
    assert histogram[0].histogram_value.num == 8


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        (["--completions.every=2"], [0] * 8 + [2] * 8),
        (["--completions.keep=4"], [0] * 4 + [1] * 4 + [2] * 4),
        (["--completions.keep=5", "--completions.every=3"], [0] * 8),  # whole groups
        (["--completions.keep=null", "--rollout.prompts_per_step=10", "--completions.every=3"], [0] * 40),
        (["--completions.every=0"], None),
    ],
)
def test_how_much_is_kept(settings, steps, rlif, small_fit):
    folder = rlif("fit", *small_fit, "--trainer.max_steps=3", *settings) / "runs/run/1"
    if steps is None:
        assert not (folder / "completions.jsonl").exists()
    else:
        assert [r["step"] for r in rows(folder / "completions.jsonl")] == steps


def test_a_rollout_of_several_steps_is_kept_once(rlif, small_fit):
    folder = rlif("fit", *small_fit, "--rollout.passes=2", "--trainer.max_steps=4") / "runs/run/1"
    assert [r["step"] for r in rows(folder / "completions.jsonl")] == [0] * 8 + [2] * 8


def test_every_counts_rollouts_that_are_due_even_if_a_rollout_serves_several_steps(rlif, small_fit):
    """With 3 steps per rollout and every=2 a modulus of the step alone kept the rollouts at 0 and 6 only."""
    args = ["--rollout.passes=3", "--trainer.max_steps=9", "--completions.every=2"]
    folder = rlif("fit", *small_fit, *args) / "runs/run/1"
    assert sorted({r["step"] for r in rows(folder / "completions.jsonl")}) == [0, 3, 6]


@pytest.mark.parametrize("name", ["every", "keep"])
def test_negative_settings_are_refused(name):
    with pytest.raises(UserError, match=f"completions.{name} is out of range"):
        Completions(**{name: -1})


# -- odd contents ---------------------------------------------------------------------------------------------


def rollout(texts, rewards, advantages, answers=None, correct=None):
    n = len(texts)
    ones = torch.ones(n, 2)
    samples = Samples(
        prompt_ids=torch.zeros(n, 1, dtype=torch.long), prompt_mask=torch.ones(n, 1, dtype=torch.bool),
        completion_ids=torch.zeros(n, 2, dtype=torch.long), completion_mask=torch.ones(n, 2, dtype=torch.bool),
        ended=torch.tensor([True] * n), logprob=ones, stats=TokenStats(ones, ones, ones),
    )  # fmt: skip
    return Rollout(
        samples, n, 1.0, torch.arange(n), list(texts), answers or [], correct,
        rewards={"r": torch.tensor(rewards)}, advantages=torch.tensor(advantages),
    )  # fmt: skip


def batch(problem="p", gold=None):
    return {"prompts": [Prompt(problem, (1,), Problem(problem, gold and Gold(gold)))], "slice": 0}


def test_a_reward_that_is_no_number_is_null():
    made = rollout(["a", "b", "c"], [math.nan, math.inf, 0.5], [0.0, 0.0, 0.0])
    found = [completion_row(made, batch(), 0, i) for i in range(3)]
    assert [r["rewards"]["r"] for r in found] == [None, None, 0.5]
    assert "NaN" not in json.dumps(found)
    assert _markdown(found).splitlines()[4] == "|  |  | &#43;0&#46;000 | 2 | a |"


def test_without_labels_a_row_has_an_answer_but_nothing_to_compare_it_with():
    row = completion_row(rollout(["a", "b"], [1.0, 2.0], [0.5, -0.5], answers=["7", None]), batch(), 0, 0)
    assert row["answer"] == "7"
    assert not {"gold", "correct"} & set(row)
    assert "right answer" not in _markdown([row])


HOSTILE = [
    "<script>alert(1)</script>",
    "# heading\n\n* list\n\n```\nfence\n```",
    "![x](http://evil.example/x.png) [a](javascript:alert(1))",
    "a\n\n\n<img src=x onerror=alert(1)>\n\n| a | b |\n|---|---|\n",
    "carriage\rreturn\x0bvertical\x0cform\u2028line\x85next <b>",
    "",
]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_text_is_shown_as_it_is_and_runs_nothing(hostile):
    """As TensorBoard's own text plugin renders it: prompt, completion and answer stay plain texts of their cells."""
    from tensorboard.plugin_util import markdown_to_safe_html

    made = rollout([hostile, "b"], [1.0, 2.0], [0.5, -0.5], ["7", "8"], torch.tensor([1.0, 0.0]))
    shown = [completion_row(made, batch(hostile, gold=hostile or "7"), 0, i) for i in range(2)]
    page = markdown_to_safe_html(_markdown(shown))
    held_out = {0: [{"step": 0, "problem": hostile, "completion": hostile, "gold": hostile, "correct": True}]}
    other = markdown_to_safe_html(answers_table(held_out))
    for tag in ("<script", "<img", "<b>", "<h1", "<a ", "<code", "<li"):
        assert tag not in page + other, page + other
    assert page.count("<table>") == other.count("<table>") == 1
    assert page.count("<td>") == 2 * 5 and other.count("<td>") == 3
    line = " ".join(plain(" ".join(hostile.split())).split())
    assert html.unescape(page).count(line) >= 3 and html.unescape(other).count(line) >= 3


ONE_STEP = SimpleNamespace(plan=SimpleNamespace(rollout_steps=1))


def test_text_that_is_no_unicode_can_be_written(tmp_path):
    """A lone surrogate in a problem's JSON made the file's encoder raise in the middle of a run."""
    made = rollout(["a", "b"], [1.0, 2.0], [0.5, -0.5])
    from rlif_lightning.runs.logger import RunLogger

    callback = Completions()
    logger = RunLogger(tmp_path / "runs/run/1")
    (tmp_path / "runs/run/1").mkdir(parents=True)
    trainer = SimpleNamespace(global_step=0, is_global_zero=True, loggers=[logger], datamodule=ONE_STEP)
    seen = {**batch("odd \ud800 text"), "metrics": {}, "collected": SimpleNamespace(rollout=made)}
    callback.on_train_batch_start(trainer, SimpleNamespace(evaluation=None), seen, 0)
    assert rows(logger.folder / "completions.jsonl")[0]["prompt"] == "odd \ud800 text"


def test_completions_must_come_after_the_rollouts():
    """In the other order the callback saw no rollout and wrote nothing, without a word."""
    trainer = SimpleNamespace(global_step=0, is_global_zero=True, loggers=[], datamodule=ONE_STEP)
    with pytest.raises(UserError, match="list RolloutCallback before"):
        Completions().on_train_batch_start(trainer, None, batch("a"), 0)
    with pytest.warns(UserWarning, match="RunLogger"):
        Completions().setup(trainer, None, "fit")


def test_files_are_bounded(tmp_path, recwarn):
    writer = Completions(limit_mb=1)
    (tmp_path / "completions.jsonl").write_bytes(bytes(999_999))
    assert writer._has_room(tmp_path, "completions.jsonl")
    (tmp_path / "completions.jsonl").write_bytes(bytes(10**6))
    for name in "ab":
        (tmp_path / f"events.out.tfevents.{name}").write_bytes(bytes(600_000))
    assert not any(writer._has_room(tmp_path, files) for files in ("completions.jsonl", "events.out.tfevents.*") * 2)
    assert ["completions.limit_mb 1: no more" in str(warning.message) for warning in recwarn] == [True, True]
    assert Completions(limit_mb=None)._has_room(tmp_path, "completions.jsonl")


def test_a_run_at_the_limit_goes_on_with_its_curves(rlif, small_fit, monkeypatch):
    monkeypatch.setattr(Completions, "_has_room", lambda *_: False)
    run = rlif("fit", *small_fit, "--trainer.max_steps=1") / "runs" / "run" / "1"
    assert not (run / "completions.jsonl").exists()
    tags = events(run).Tags()
    assert "rollout/reward" in scalars(run) and not tags["histograms"]
    assert not any("samples" in name for name in tags["tensors"])
