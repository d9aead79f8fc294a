"""Weights shared out over two processes on one CPU: the same training as one process that holds them all."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from tests.processes import Processes, assert_same_state, differences, largest_difference
from tests.short_runs import many_ends

slow = pytest.mark.slow

TOLERANCE = 5e-5  # of any weight after three steps with a learning rate of 0.03
# A slice of two rows holds one prompt here and two there: the layers are called equally often all the same.
SHORT = ("--trainer.max_steps=3", "--evaluation.n=3", "--rollout.micro_batch_size=2")
# Everything that reads or writes weights besides the update: an adapter, recomputed layers, a running mean.
LORA = (*SHORT, "--model.lora", '{"r": 4, "target_modules": "all-linear", "lora_dropout": 0.0}',
        "--model.gradient_checkpointing=true", "--model.reference=ema", "--model.ema_decay=0.5",
        "--rollout.rewards", '[{"class_path": "SelfCertainty", "init_args": {"annotator": "ema"}}]')  # fmt: skip


@pytest.fixture(scope="module")
def fit(model_folder, problems_file, tmp_path_factory):
    """``fit(runs, *settings, processes=2, kill_at=0)``: the result of a run."""
    root = tmp_path_factory.mktemp("fsdp2")
    return Processes(root, many_ends(model_folder(), root / "model"), problems_file, strategy="fsdp2")


@pytest.fixture(scope="module")
def two(fit):
    """An uninterrupted run of two processes."""
    return fit("two", *SHORT, "--checkpoint.keep=null")


def assert_same_training(alone, two):
    """The same completions, and the same weights and metrics up to rounding."""
    for one, *parts in zip(*alone.notes, *two.notes, strict=True):
        for key in ("prompts", "texts", "lengths"):
            assert one[key] == [x for part in parts for x in part[key]], (key, one["step"])
    assert largest_difference(alone.weights, two.weights) < TOLERANCE
    for step, name, one, other in differences(alone, two):
        assert float(one) == pytest.approx(float(other), rel=1e-3, abs=1e-5), (step, name)


@slow
def test_one_process_trains_the_same(fit, two, model_folder):
    """With completions of different lengths, a frozen reference, clipped gradients, accumulation."""
    assert any(max(a["lengths"]) != max(b["lengths"]) for a, b in zip(*two.notes, strict=True))
    alone = fit("one", *SHORT, processes=1)
    start = {f"model.{name}": w for name, w in load_file(model_folder() / "model.safetensors").items()}
    assert largest_difference(alone.weights, start) > 0.01
    assert_same_training(alone, two)
    assert float(two.table[0]["train/kl"]) == 0.0
    assert float(two.table[1]["train/kl"]) > 0


@slow
def test_in_mixed_precision(fit):
    """The divergence from a frozen copy starts at exactly 0, all numbers are finite, and it learns."""
    run = fit("mixed", *SHORT, "--trainer.max_steps=2", "--evaluation.every=9", "--trainer.precision=bf16-mixed")
    assert float(run.table[0]["train/kl"]) == 0 < float(run.table[1]["train/kl"])
    assert all(math.isfinite(float(row[f"train/{name}"])) for row in run.table[:2] for name in ("loss", "grad_norm"))
    assert all(bool(w.isfinite().all()) and w.dtype == torch.float32 for w in run.weights.values())


@slow
def test_each_process_holds_its_share(two):
    whole = sum(w.numel() for w in two.weights.values())
    held = [note[0]["held"] for note in two.notes]
    assert sum(held) == whole
    assert max(held) < 0.55 * whole


@slow
def test_continued_bit_by_bit(fit, two):
    part = fit(two.copy("part", step=1), *SHORT, "--ckpt_path=last")
    assert_same_state(two, part)
    assert differences(two, part) == []


@slow
def test_longest_batch_can_be_tried(fit, two):
    """Where it is asked for; it leaves no trace."""
    tried = fit("tried", *SHORT, "--memory_check.action=try")
    assert largest_difference(tried.weights, two.weights) == 0


@slow
def test_continued_by_one_process_that_shares_nothing_out(fit, two):
    """A checkpoint is the same file with any strategy."""
    end = fit(two.copy("alone", step=1), *SHORT, "--ckpt_path=last", processes=1)
    assert end.said.count("Continued by 1 process; the checkpoint was written by 2") == 1
    assert largest_difference(end.weights, two.weights) < TOLERANCE
    a, b = (run.checkpoint["optimizer_states"][0]["state"] for run in (end, two))
    for number, own in a.items():
        torch.testing.assert_close(own, b[number], rtol=1e-3, atol=1e-6)


@slow
def test_an_adapter_and_its_running_mean(fit):
    alone, two = fit("lora-one", *LORA, processes=1), fit("lora-two", *LORA)
    assert_same_training(alone, two)
    means = [run.checkpoint["rlif"]["versions"]["ema"] for run in (alone, two)]
    assert largest_difference(*means) < TOLERANCE
    names = [name for name in alone.weights if "lora_B" in name]
    assert min(float(alone.weights[name].abs().max()) for name in names) > 1e-3


@slow
def test_the_guard_hands_back_shares(fit, model_folder):
    rule = ["--guard.signals=[similarity]", "--guard.warmup=0", "--guard.patience=1", "--guard.smoothing=1"]
    model = ("--model.name", model_folder())
    run = fit("guard", *model, *rule, "--guard.drop=0.01", "--guard.action=restore")
    told = json.loads((run.folder / "guard.json").read_text())
    assert len(run.notes[0]) == told["fired"]["step"] + 1 < 5
    kept = load_file(run.folder / "checkpoints" / "guard" / "weights.safetensors")
    ends = run.ends()
    assert largest_difference(ends[0], kept) == largest_difference(ends[1], kept) == 0
    assert largest_difference({f"model.{name}": w for name, w in kept.items()}, run.weights) == 0


@slow
def test_a_test_answers_as_the_end_of_training_did(fit, two, problems_file):
    source = ("--data.test.path", problems_file, "--data.test.gold", r"[#]{4}\s*(.+)", "--data.test.limit=3")
    fit("test", *source, "--ckpt_path", two.folder, command="test")
    told = json.loads((two.runs.with_name("test") / "run" / "test" / "1" / "results.json").read_text())
    last = two.table[-1]
    for name in ("accuracy", "accuracy_sampled", "mean_tokens", "mean_tokens_sampled"):
        assert told[name] == pytest.approx(float(last[f"val/{name}"]), abs=1e-6)
    assert told["n"] == 3 and told["mean_tokens_sampled"] > 1
