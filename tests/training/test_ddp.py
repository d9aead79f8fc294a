"""Two processes on one CPU: the same training as one process, resumed exactly, in one run folder."""

import json

import pytest
from safetensors.torch import load_file

from tests.processes import Processes, assert_same_state, differences, largest_difference
from tests.short_runs import many_ends

pytestmark = pytest.mark.slow

TOP = "--model.top_entropy_fraction=0.5"
TOLERANCE = 5e-5  # of any weight after five steps with a learning rate of 0.03; measured: 1e-5


@pytest.fixture(scope="module")
def fit(model_folder, problems_file, tmp_path_factory):
    """``fit(runs, *settings, processes=2, kill_at=0)``: the result of a run."""
    root = tmp_path_factory.mktemp("ddp")
    return Processes(root, many_ends(model_folder(), root / "model"), problems_file)


@pytest.fixture(scope="module")
def two(fit):
    """An uninterrupted run of two processes."""
    return fit("two", TOP, "--checkpoint.keep=null", launched=True)


def test_processes_see_disjoint_prompts_and_differ_in_length(two):
    first, second = two.notes
    for one, other in zip(first, second, strict=True):
        assert len(one["prompts"]) == len(other["prompts"]) == 2
        assert not set(one["prompts"]) & set(other["prompts"])
    assert any(sum(a["lengths"]) != sum(b["lengths"]) for a, b in zip(first, second, strict=True))
    assert any(max(a["lengths"]) != max(b["lengths"]) for a, b in zip(first, second, strict=True))
    rows = [json.loads(line) for line in (two.folder / "completions.jsonl").read_text().splitlines()]
    assert [r["completion"] for r in rows] == [text for note in first for text in note["texts"]]


def test_an_epoch_drops_its_last_incomplete_rollout_on_both(two):
    """Thirteen prompts make three rollouts of four; the thirteenth waits for an epoch that deals it in."""
    seen = [one["prompts"] + other["prompts"] for one, other in zip(*two.notes, strict=True)]
    assert len({prompt for rollout in seen[:3] for prompt in rollout}) == 12
    assert len(seen) == 5 and all(len(set(rollout)) == 4 for rollout in seen)


def test_metrics_are_logged_once_and_are_means_over_both(two):
    first, second = two.notes
    assert [int(row["step"]) for row in two.table] == [0, 1, 2, 3, 4, 5]
    for row, one, other in zip(two.table, first, second, strict=False):
        rewards, lengths = one["rewards"] + other["rewards"], one["lengths"] + other["lengths"]
        assert float(row["rollout/reward"]) == pytest.approx(sum(rewards) / 16, rel=1e-6)
        assert float(row["rollout/completion_tokens"]) == sum(lengths) / 16
        entropy = (one["entropy"] + other["entropy"]) / sum(lengths)
        assert float(row["rollout/entropy"]) == pytest.approx(entropy, rel=1e-6)


def test_one_process_trains_the_same(fit, two, model_folder):
    """The same completions whoever samples them, and the same gradient however it is shared out.

    With a large epsilon: Adam would blow the rounding noise of a gradient that is almost 0 up to a whole step.
    """
    alone = fit("one", TOP, processes=1)
    for one, *parts in zip(*alone.notes, *two.notes, strict=True):
        for key in ("prompts", "texts", "lengths"):
            assert one[key] == [x for part in parts for x in part[key]], (key, one["step"])
    start = {f"model.{name}": w for name, w in load_file(model_folder() / "model.safetensors").items()}
    assert largest_difference(alone.weights, start) > 0.01
    assert largest_difference(alone.weights, two.weights) < TOLERANCE
    for step, name, one, other in differences(alone, two):
        assert float(one) == pytest.approx(float(other), rel=1e-3, abs=1e-5), (step, name)


def test_killed_and_continued(fit, two):
    """Three rollouts an epoch of two micro-batches each; the eighth batch is in mid-accumulation of step 3."""
    part = fit("part", TOP, kill_at=8)
    assert part.checkpoint["global_step"] == 3
    part = fit("part", TOP, "--ckpt_path=last")
    assert "was written by" not in part.said
    assert_same_state(two, part)
    assert differences(two, part) == []
    assert (two.folder / "completions.jsonl").read_bytes() == (part.folder / "completions.jsonl").read_bytes()


def test_continued_by_another_number_of_processes(fit, two):
    """The same prompts in the same order; the same weights up to rounding."""
    end = fit(two.copy("alone", step=3), TOP, "--ckpt_path=last", processes=1)
    assert end.said.count("Continued by 1 process; the checkpoint was written by 2") == 1
    for note, *parts in zip(end.notes[0], *(notes[3:] for notes in two.notes), strict=True):
        assert note["prompts"] == [prompt for part in parts for prompt in part["prompts"]]
    assert largest_difference(end.weights, two.weights) < TOLERANCE
    for step, name, one, other in differences(end, two):
        assert float(one) == pytest.approx(float(other), rel=1e-3, abs=1e-5), (step, name)


@pytest.mark.parametrize("action", ["warn", "restore"])
def test_the_guard_decides_and_hands_back_for_both(fit, model_folder, action):
    """Only the first process keeps weights; both evaluate them, and both get them."""
    rule = ["--guard.signals=[similarity]", "--guard.warmup=0", "--guard.patience=1", "--guard.smoothing=1"]
    model = ("--model.name", model_folder())
    run = fit(f"guard-{action}", *model, *rule, "--guard.drop=0.01", "--guard.action", action)
    told = json.loads((run.folder / "guard.json").read_text())
    step = told["fired"]["step"]
    assert len(run.notes[0]) == len(run.notes[1]) == (5 if action == "warn" else step + 1)
    kept = load_file(run.folder / "checkpoints" / "guard" / "weights.safetensors")
    ends = run.ends()
    assert largest_difference(*ends) == 0
    assert largest_difference({f"model.{name}": w for name, w in ends[0].items()}, run.weights) == 0
    assert (largest_difference(ends[0], kept) == 0) == (action == "restore")
    accuracy = told["accuracy"]
    assert accuracy["start"].keys() == accuracy["handed_back"].keys() == accuracy["end"].keys()
    similarity = told["signals"]["rollout/similarity"]["raw"]
    assert similarity == [pytest.approx(float(row["rollout/similarity"])) for row in run.table[: len(similarity)]]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_steps_without_a_finite_gradient_are_skipped_by_both(fit, strategy):
    """The KL term is 0 at the first step and overflows afterwards; the file holds the completions of both."""
    settings = ["--model.kl_coefficient=1e30", "--evaluation.every=0", "--trainer.max_steps=9"]
    end = fit(f"skips-{strategy}", *settings, strategy=strategy, kill_at=1000)
    assert end.code == 2 and "error: 3 steps in a row had a gradient that is not finite" in end.said
    assert [row["train/skipped_steps"] for row in end.table] == ["0.0", "1.0", "2.0", "3.0"]
    rows = [json.loads(line) for line in (end.folder / "skipped.jsonl").read_text().splitlines()]
    for step in (1, 2, 3):
        texts = [text for notes in end.notes for text in notes[step]["texts"]]
        assert [row["completion"] for row in rows if row["step"] == step] == texts
    assert end.checkpoint["global_step"] == 3 and all(w.isfinite().all() for w in end.weights.values())
