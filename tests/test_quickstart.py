"""The finding: self-certainty lifts held-out accuracy, then training on pulls it below its start."""

import json
import os
import subprocess
import sys

import pytest

from rlif_lightning.runs.metrics_csv import read_metrics
from rlif_lightning.toy import toy_model

pytestmark = pytest.mark.slow


def quickstart(folder, *arguments, threads=1):
    """Run the shipped quickstart in a process of its own; returns output and the sampled held-out accuracy."""
    done = subprocess.run(
        [sys.executable, "-m", "rlif_lightning", "fit", "--config", "quickstart", *arguments],
        cwd=folder,
        # Threads that wait for each other sleep: on a busy machine they would burn minutes.
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done, read_metrics(folder / "runs/quickstart/1/metrics.csv")["val/accuracy_sampled"]


def check_rise_and_fall(curve, end=120):
    assert len(curve) == end // 5 + 1 and min(curve) == 0 and max(curve) == end
    assert max(curve.values()) - curve[0] >= 0.30
    assert curve[end] < curve[0]


def test_rise_and_fall_and_what_a_run_leaves(tmp_path):
    done, curve = quickstart(tmp_path)
    check_rise_and_fall(curve)
    run = tmp_path / "runs/quickstart/1"
    names = {p.name for p in run.iterdir()}
    assert {
        "config.yaml",
        "checkpoints",
        "metrics.csv",
        "completions.jsonl",
        "curves.png",
        "summary.txt",
        "report.html",
    } <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    output = done.stdout + done.stderr
    for told in (
        "report.html",
        "rlif export runs/quickstart/1",
        "runs/quickstart/1",
        "16 prompts x 8 completions = 128",
        "near 0",
    ):
        assert told in output
    guard = json.loads((run / "guard.json").read_text())
    start, handed, end = (guard["accuracy"][k]["val/accuracy_sampled"] for k in ("start", "handed_back", "end"))
    assert (start, end) == (curve[0], curve[120]) and handed - start >= 0.25 and guard["taken"] == "recorded"
    assert f"(of step {guard['handed_back_step']}, accuracy" in output and "handed back" in output
    assert (run / guard["weights"]).is_file()
    metrics = read_metrics(run / "metrics.csv")
    assert metrics["train/kl"][0] == 0.0 and metrics["train/ratio_mean"][0] == 1.0
    assert 0 <= metrics["rollout/kl"][0] < 1e-8  # the sampler rounds differently from the update
    assert metrics["rollout/reward"][119] > metrics["rollout/reward"][0]


def test_with_slightly_other_base_weights_and_two_threads(tmp_path):
    """The finding must not hang on the last bits of the base model, nor on the order in which numbers are added."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = toy_model("toy", progress=False)
    model, noise = AutoModelForCausalLM.from_pretrained(folder), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1e-6 * torch.randn(parameter.shape, generator=noise)
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "base")
    words = ("--model.name", str(tmp_path / "base"), "--trainer.max_steps", "80")
    check_rise_and_fall(quickstart(tmp_path, *words, threads=2)[1], end=80)
