"""A run that was stopped anywhere and continued is the uninterrupted run, bit by bit."""

import csv
import shutil
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlif_lightning.module import RLIFModule

UNCOMPARED = ("time/", "memory/", "rollout/tokens_per_second")
LORA = ["--model.lora={r: 4, lora_alpha: 8, lora_dropout: 0.1, target_modules: [q_proj, v_proj]}"]
TWO_PASSES = ["--rollout.passes=2", "--rollout.steps_per_rollout=2", "--model.clip_low=0.05"]


class Killed(Exception):
    """Ends a run as a kill does: nothing is saved on the way out."""


@pytest.fixture
def fit(rlif, small_fit, problems_file, monkeypatch):
    """``fit(runs, *settings, kill_at=7)``: train; a killed run dies in its 7th micro-batch. Returns the run folder."""
    arguments = [
        *small_fit,
        "--data.val.path", problems_file, "--data.val.gold", r"[#]{4}\s*(.+)", "--data.train.limit=7",
        "--evaluation.every=2", "--evaluation.n=3", "--rollout.micro_batch_size=4", "--checkpoint.every=1",
        "--model.schedule=cosine", "--model.warmup_ratio=0.2", "--trainer.max_steps=8",
    ]  # fmt: skip
    step = RLIFModule.training_step

    def run(runs, *settings, kill_at=None):
        calls = []

        def counted(self, batch, batch_idx):
            calls.append(1)
            if len(calls) == kill_at:
                raise Killed
            return step(self, batch, batch_idx)

        monkeypatch.setattr(RLIFModule, "training_step", counted)
        command = ["fit", *arguments, "--runs", runs, *settings]
        if kill_at is None:
            rlif(*command)
        else:
            with pytest.raises(Killed):
                rlif(*command)
        numbers = [int(p.name) for p in Path(runs, "run").iterdir()]
        return Path(runs).absolute() / "run" / str(max(numbers))

    return run


def checkpoint(run, name="last.ckpt"):
    return torch.load(run / "checkpoints" / name, weights_only=True)


def table(run):
    """Rows of metrics.csv without times and memory."""
    with (run / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if not k.startswith(UNCOMPARED)} for row in csv.DictReader(file)]


def scalars(run):
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if not tag.startswith(UNCOMPARED)
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(one, other):
    a, b = checkpoint(one), checkpoint(other)
    for part in ("global_step", "epoch", "state_dict", "optimizer_states", "lr_schedulers", "callbacks"):
        assert same(a[part], b[part]), part
    assert table(one) == table(other)
    assert (one / "completions.jsonl").read_bytes() == (other / "completions.jsonl").read_bytes()
    assert scalars(one) == scalars(other)
    steps = [int(row["step"]) for row in table(one)]
    assert steps == sorted(set(steps))


@pytest.mark.parametrize("settings", [[], LORA], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("kill_at", "saved"), [(7, 3), (9, 4), (10, 4)], ids=["epoch edge", "mid-epoch", "mid-accumulation"]
)
def test_killed_and_continued(fit, kill_at, saved, settings):
    """Three rollouts an epoch of two micro-batches each; the seventh prompt is left over."""
    whole = fit("whole", *settings)
    part = fit("part", *settings, kill_at=kill_at)
    assert checkpoint(part)["global_step"] == saved
    assert fit("part", *settings, "--ckpt_path=last") == part
    assert_same_run(whole, part)
