"""Two processes on one CPU: the same training as one process, resumed exactly, in one run folder."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

UNCOMPARED = ("time/", "memory/", "rollout/tokens_per_second")

# Runs `rlif fit` in each process; rank 1 notes its rollouts, and both can be killed in a micro-batch.
SCRIPT = """
import json, os, sys
import torch
torch.set_num_threads(1)
from rlif_lightning.callbacks.guard import CollapseGuard
from rlif_lightning.callbacks.rollout import RolloutCallback
from rlif_lightning.cli import main
from rlif_lightning.module import RLIFModule
from rlif_lightning.trainable import trainable_weights

collect, step, calls = RolloutCallback._collect, RLIFModule.training_step, []
kill_at, notes = int(os.environ["KILL_AT"]), os.environ["NOTES"]

def noted(self, trainer, module, batch):
    collect(self, trainer, module, batch)
    r = self.rollout
    row = {"step": trainer.global_step, "rank": trainer.global_rank,
           "prompts": [p.text for p in batch["prompts"]], "texts": r.texts, "lengths": r.samples.lengths.tolist(),
           "rewards": next(iter(r.rewards.values())).tolist(), "entropy": float(r.samples.stats.entropy.sum())}
    with open(f"{notes}.{trainer.global_rank}", "a") as file:
        file.write(json.dumps(row) + "\\n")

def counted(self, batch, batch_idx):
    calls.append(1)
    if len(calls) == kill_at:
        os._exit(9)
    return step(self, batch, batch_idx)

def ended(self, trainer, module):
    train_end(self, trainer, module)
    torch.save(trainable_weights(module.policy), f"{notes}.end.{trainer.global_rank}")

train_end, CollapseGuard.on_train_end = CollapseGuard.on_train_end, ended
RolloutCallback._collect, RLIFModule.training_step = noted, counted
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def fit(model_folder, problems_file, tmp_path_factory):
    """``fit(runs, *settings, processes=2, kill_at=0)``: the run folder, and the notes of each process."""
    root = tmp_path_factory.mktemp("ddp")
    (root / "train.py").write_text(SCRIPT)
    arguments = [
        "--model.name", model_folder(), "--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=0.03",
        "--model.optimizer.eps=0.01",
        "--model.kl_coefficient=0.01", "--model.top_entropy_fraction=0.5",
        "--model.schedule=cosine", "--trainer.gradient_clip_val=1.0",
        "--data.train.path", problems_file, "--data.train.gold", r"[#]{4}\s*(.+)", "--data.train.limit=13",
        "--data.val.path", problems_file, "--data.val.gold", r"[#]{4}\s*(.+)",
        "--data.answers.completion=last_number", "--data.template={prompt} ",
        "--rollout.prompts_per_step=4", "--rollout.group_size=4", "--rollout.max_new_tokens=40",
        "--rollout.micro_batch_size=4", "--rollout.temperature=2.0", "--completions.keep=null",
        "--evaluation.max_new_tokens=6", "--evaluation.every=2", "--evaluation.n=5", "--checkpoint.every=1",
        "--trainer.accelerator=cpu", "--trainer.max_steps=5", "--trainer.enable_progress_bar=false",
    ]  # fmt: skip

    def run(runs, *settings, processes=2, kill_at=0):
        devices = ["--trainer.devices", processes, *(["--trainer.strategy=ddp"] if processes > 1 else [])]
        command = [sys.executable, root / "train.py", "fit", *arguments, *devices, "--runs", runs, *settings]
        done = subprocess.run(
            [str(word) for word in command],
            cwd=root,
            env={**os.environ, "OMP_NUM_THREADS": "1", "KILL_AT": str(kill_at), "NOTES": str(root / runs)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert (done.returncode == 0) == (kill_at == 0), done.stderr[-3000:]
        assert [p.name for p in (root / runs / "run").iterdir()] == ["1"]
        notes = [
            [json.loads(line) for line in Path(f"{root / runs}.{rank}").read_text().splitlines()]
            for rank in range(processes)
        ]
        return root / runs / "run" / "1", notes

    return run


@pytest.fixture(scope="module")
def two(fit):
    """An uninterrupted run of two processes."""
    return fit("two")


def checkpoint(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def table(run):
    with (run / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if not k.startswith(UNCOMPARED)} for row in csv.DictReader(file)]


def differences(one, other):
    assert [row["step"] for row in one] == [row["step"] for row in other]
    return [
        (a["step"], name, a.get(name), b.get(name))
        for a, b in zip(one, other, strict=True)
        for name in {**a, **b}
        if a.get(name) != b.get(name)
    ]


def test_processes_see_disjoint_prompts_and_differ_in_length(two):
    run, (first, second) = two
    for one, other in zip(first, second, strict=True):
        assert len(one["prompts"]) == len(other["prompts"]) == 2
        assert not set(one["prompts"]) & set(other["prompts"])
    assert any(sum(a["lengths"]) != sum(b["lengths"]) for a, b in zip(first, second, strict=True))
    steps = [int(row["step"]) for row in table(run)]
    assert steps == [0, 1, 2, 3, 4, 5]
    rows = [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]
    assert [r["completion"] for r in rows] == [text for note in first for text in note["texts"]]


def test_metrics_are_means_over_both(two):
    run, (first, second) = two
    for row, one, other in zip(table(run), first, second, strict=False):
        rewards, lengths = one["rewards"] + other["rewards"], one["lengths"] + other["lengths"]
        assert float(row["rollout/reward"]) == pytest.approx(sum(rewards) / 16, rel=1e-6)
        assert float(row["rollout/completion_tokens"]) == sum(lengths) / 16
        entropy = (one["entropy"] + other["entropy"]) / sum(lengths)
        assert float(row["rollout/entropy"]) == pytest.approx(entropy, rel=1e-6)


def test_one_process_trains_the_same(fit, two, model_folder):
    """The same completions whoever samples them, and the same gradient however it is shared out.

    With a large epsilon: Adam would blow the rounding noise of a gradient that is almost 0 up to a whole step.
    """
    run, notes = two
    alone, (own,) = fit("one", processes=1)
    for one, *parts in zip(own, *notes, strict=True):
        for key in ("prompts", "texts", "lengths"):
            assert one[key] == [x for part in parts for x in part[key]], (key, one["step"])
    a, b = checkpoint(alone)["state_dict"], checkpoint(run)["state_dict"]
    start = load_file(model_folder() / "model.safetensors")
    assert a.keys() == b.keys()
    assert max(float((a[f"policy.{name}"] - start[name]).abs().max()) for name in start) > 0.01
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5)
    for step, name, one, other in differences(table(alone), table(run)):
        assert float(one) == pytest.approx(float(other), rel=1e-3, abs=1e-5), (step, name)


def test_killed_and_continued(fit, two):
    """Three rollouts an epoch of two micro-batches each; the eighth batch is in mid-accumulation of step 3."""
    run, _ = two
    part, _ = fit("part", kill_at=8)
    assert checkpoint(part)["global_step"] == 3
    fit("part", "--ckpt_path=last")
    a, b = checkpoint(run), checkpoint(part)
    for name, value in a["state_dict"].items():
        assert torch.equal(value, b["state_dict"][name]), name
    for one, other in zip(
        a["optimizer_states"][0]["state"].values(), b["optimizer_states"][0]["state"].values(), strict=True
    ):
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert differences(table(run), table(part)) == []
    assert (run / "completions.jsonl").read_bytes() == (part / "completions.jsonl").read_bytes()


@pytest.mark.parametrize("action", ["warn", "restore"])
def test_the_guard_decides_and_hands_back_for_both(fit, action):
    """Only the first process keeps weights; both evaluate them, and both get them."""
    rule = ["--guard.signals=[similarity]", "--guard.warmup=0", "--guard.patience=1", "--guard.smoothing=1"]
    rule.append("--model.top_entropy_fraction=1")  # with it this run's similarity falls, and the guard fires
    run, notes = fit(f"guard-{action}", *rule, "--guard.drop=0.01", "--guard.action", action)
    told = json.loads((run / "guard.json").read_text())
    step = told["fired"]["step"]
    assert len(notes[0]) == len(notes[1]) == (5 if action == "warn" else step + 1)
    kept = load_file(run / "checkpoints" / "guard" / "weights.safetensors")
    ends = [torch.load(f"{run.parents[1]}.end.{rank}", weights_only=True) for rank in (0, 1)]
    final = checkpoint(run)["state_dict"]
    for name, weight in final.items():
        one, other = (end[name.removeprefix("policy.")] for end in ends)
        assert torch.equal(one, other) and torch.equal(one, weight)
    restored = all(torch.equal(ends[0][name], kept[name]) for name in kept)
    assert restored == (action == "restore")
    accuracy = told["accuracy"]
    assert accuracy["start"].keys() == accuracy["handed_back"].keys() == accuracy["end"].keys()
    similarity = told["signals"]["rollout/similarity"]["raw"]
    assert similarity == [pytest.approx(float(row["rollout/similarity"])) for row in table(run)[: len(similarity)]]
