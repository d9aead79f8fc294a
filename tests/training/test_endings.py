"""Signals and endings: what a stopped run has saved, its exit code, and how it comes to its end."""

import errno
import json
import os
import signal
from pathlib import Path

import pytest
import torch

from rlif_lightning.callbacks import CollapseGuard, Evaluation, RolloutCallback
from rlif_lightning.callbacks.report import Report
from rlif_lightning.errors import UserError
from rlif_lightning.models.checkpoints import AtomicCheckpointIO, read_checkpoint
from rlif_lightning.runs import curves
from rlif_lightning.runs.metrics_csv import read_metrics
from rlif_lightning.training.module import RLIFModule

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129, signal.SIGUSR1: 75}
UNCOMPARED = ("time/", "memory/", "rollout/tokens_per_second")


@pytest.fixture
def fit(rlif, small_fit, problems_file):
    """``fit(runs, *settings)``: train; returns the exit code and the newest run folder."""
    data = ["--data.val.path", problems_file, "--data.val.gold", r"[#]{4}\s*(.+)", "--evaluation.n=3"]
    often = ["--evaluation.every=0", "--trainer.max_steps=3", "--checkpoint.every=100", "--guard.action=warn"]

    def run(runs, *settings):
        code = 0
        try:
            rlif("fit", *small_fit, *data, *often, "--runs", runs, *settings)
        except SystemExit as end:
            code = end.code
        found = sorted(Path(runs, "run").glob("*"), key=lambda p: int(p.name))
        return code, found[-1].absolute() if found else None

    return run


def signals_at(monkeypatch, cls, name, number, call=1):
    """Send a signal at a call of a method, before it does anything."""
    method, calls = getattr(cls, name), []

    def signalled(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return method(self, *args, **kwargs)

    monkeypatch.setattr(cls, name, signalled)


def left(run):
    """Everything that a run leaves, but for times."""
    stored = read_checkpoint(run / "checkpoints" / "last.ckpt")
    metrics = {k: v for k, v in read_metrics(run / "metrics.csv").items() if not k.startswith(UNCOMPARED)}
    guard = json.loads((run / "guard.json").read_text()) if (run / "guard.json").exists() else None
    files = {p.name for p in run.iterdir() if p.suffix in (".png", ".txt", ".json")}
    parts = ("epoch", "global_step", "optimizer_states", "lr_schedulers", "state_dict")
    return repr([stored[k] for k in parts]), metrics, guard, files, (run / "completions.jsonl").read_bytes()


@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize(
    ("cls", "name", "call", "saved"),
    [(RolloutCallback, "_collect", 3, 2), (RLIFModule, "training_step", 2, 1), (RolloutCallback, "_collect", 1, 0)],
    ids=["rollout", "update", "first rollout"],
)
def test_what_is_under_way_is_dropped_and_done_again(fit, monkeypatch, caplog, number, cls, name, call, saved):
    torch.set_printoptions(precision=10)
    if (number, name) not in ((signal.SIGTERM, "_collect"), (signal.SIGHUP, "training_step")) and saved != 2:
        pytest.skip("one signal is enough here")
    with monkeypatch.context() as patch:
        signals_at(patch, cls, name, number, call)
        code, run = fit("part")
    assert code == CODES[number] and read_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == saved
    said = f"Stopped by {number.name} after step {saved}; continue with --ckpt_path last"
    assert said in caplog.text
    assert not (run / "curves.png").exists()
    assert fit("part", "--ckpt_path=auto") == (0, run)
    assert left(run) == left(fit("whole", "--ckpt_path=auto")[1])


@pytest.mark.parametrize(
    ("cls", "name", "saved"), [(RolloutCallback, "_collect", 2), (RLIFModule, "window_metrics", 0)]
)
def test_an_error_costs_no_finished_rollout(fit, monkeypatch, caplog, cls, name, saved):
    """Between the optimiser's step and the end of its rollout the weights are those of neither."""
    method, calls = getattr(cls, name), []

    def failing(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise UserError("It has failed")
        return method(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(cls, name, failing)
        code, run = fit("part")
    assert code == 2 and read_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == saved
    assert (f"Stopped by an error after step {saved}; continue with --ckpt_path last" in caplog.text) == (saved > 0)
    assert fit("part", "--ckpt_path=auto") == (0, run)
    assert left(run) == left(fit("whole")[1])


def test_an_evaluation_is_given_up_and_its_step_saved(fit, monkeypatch):
    often = "--evaluation.every=1"
    with monkeypatch.context() as patch:
        signals_at(patch, Evaluation, "_answer", signal.SIGTERM, 2)
        code, run = fit("part", often)
    assert code == 143 and read_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == 1
    assert read_metrics(run / "metrics.csv")["val/accuracy"].keys() == {0}
    assert fit("part", often, "--ckpt_path=last") == (0, run)
    assert left(run) == left(fit("whole", often)[1])


@pytest.mark.parametrize("name", ["configure_model", "setup"])
def test_before_the_first_step_nothing_is_left(fit, monkeypatch, name):
    signals_at(monkeypatch, RLIFModule, name, signal.SIGTERM)
    assert fit("runs") == (143, None)


@pytest.mark.parametrize(
    ("cls", "name"),
    [(Evaluation, "on_train_end"), (CollapseGuard, "on_train_end"), (Report, "on_fit_end")],
    ids=["evaluation", "guard", "report"],
)
def test_an_interrupted_ending_is_done_again(fit, monkeypatch, caplog, cls, name):
    with monkeypatch.context() as patch:
        signals_at(patch, cls, name, signal.SIGTERM)
        code, run = fit("part")
    assert code == 143 and read_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == 3
    assert not (run / "summary.txt").exists()
    assert fit("part", "--ckpt_path=last") == (0, run)
    assert "Nothing was trained" not in caplog.text
    assert left(run) == left(fit("whole")[1])
    for again in ("auto", "last"):
        caplog.clear()
        assert fit("part", f"--ckpt_path={again}") == (0, run)
        assert "is complete at step 3" in caplog.text


FIRES = ["--guard.signals=[similarity]", "--guard.warmup=0", "--guard.patience=1", "--guard.smoothing=1"]
FIRES += ["--guard.drop=0.2", "--guard.action=restore", "--model.optimizer.lr=0.02", "--trainer.max_steps=8"]


@pytest.mark.parametrize(
    ("cls", "name", "call"),
    [
        (CollapseGuard, "_hand_back", 1),  # before the weights are put back
        (Evaluation, "_answer", 2),  # while those of the end are evaluated
        (Evaluation, "_answer", 3),  # while those that are handed back are
        (Evaluation, "on_train_end", 1),  # after the save
    ],
    ids=["hand back", "end", "handed back", "ending"],
)
def test_a_guard_that_restores_tells_all_accuracies_after_an_interruption(fit, monkeypatch, cls, name, call):
    """The checkpoint holds the restored weights: those of the end can't be evaluated again."""
    with monkeypatch.context() as patch:
        signals_at(patch, cls, name, signal.SIGTERM, call)
        code, run = fit("part", *FIRES)
    assert code == 143
    assert fit("part", *FIRES, "--ckpt_path=last") == (0, run)
    assert left(run) == left(fit("whole", *FIRES)[1])
    told = json.loads((run / "guard.json").read_text())
    assert told["taken"] == "restored" and told["accuracy"].keys() == {"start", "end", "handed_back"}
    assert "handed back" in (run / "summary.txt").read_text()


def test_a_picture_that_fails_does_not_fail_the_run(fit, monkeypatch, capsys):
    monkeypatch.setattr(curves, "draw_curves", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match="No curves.png: ZeroDivisionError"):
        code, run = fit("runs")
    assert code == 0 and (run / "summary.txt").exists()


def test_a_picture_that_a_full_disk_does_not_take_is_drawn_by_the_continued_run(fit, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(curves, "draw_curves", full)
        code, run = fit("runs")
    said = capsys.readouterr().err
    assert code == 1 and "There is no room for" in said and "step 3 is saved" in said and "Traceback" not in said
    assert fit("runs", "--ckpt_path=last") == (0, run)
    assert (run / "curves.png").exists() and (run / "summary.txt").exists()


def test_a_newer_run_without_a_checkpoint(fit, monkeypatch, capsys):
    _, first = fit("runs", "--trainer.max_steps=1")
    before = (first / "checkpoints" / "last.ckpt").read_bytes()

    def killed(*_, **__):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(AtomicCheckpointIO, "save_checkpoint", killed)
        assert fit("runs", "--model.kl_coefficient=0.5")[0] == 1
    code, second = fit("runs", "--ckpt_path=last")
    said = capsys.readouterr().err
    assert code == 2 and second != first and str(second)[-10:] in said and str(first)[-10:] in said
    code, third = fit("runs", "--ckpt_path=auto", "--trainer.max_steps=1")
    assert code == 0 and third not in (first, second) and (first / "checkpoints" / "last.ckpt").read_bytes() == before


def test_slurm_neither_requeues_nor_brings_its_own_checkpoint(fit, monkeypatch, tmp_path):
    for name, value in {"JOB_ID": 7, "NTASKS": 1, "JOB_NAME": "a", "PROCID": 0, "LOCALID": 0, "NODEID": 0}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.setenv("SLURM_NODELIST", "localhost")
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text('#!/bin/sh\necho "$@" > asked\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    (tmp_path / "hpc_ckpt_1.ckpt").write_text("of another run")
    with monkeypatch.context() as patch:
        signals_at(patch, RolloutCallback, "_collect", signal.SIGUSR1, 2)
        code, run = fit("runs")
    assert code == 75 and not Path("asked").exists() and len(list(tmp_path.glob("hpc_ckpt_*"))) == 1
    assert fit("runs", "--ckpt_path=auto") == (0, run)
