"""Faults that a long run meets in the wild: nothing is lost, nothing is silent, and no traceback is shown."""

import errno
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from safetensors import SafetensorError

from rlif_lightning.callbacks import Evaluation, RolloutCallback
from rlif_lightning.errors import DiskFailure, UserError
from rlif_lightning.grading import AnswerFormat, Gold, Grader
from rlif_lightning.models.checkpoints import read_checkpoint
from rlif_lightning.rewards import SelfCertainty
from rlif_lightning.runs import folder as runs
from rlif_lightning.runs.atomic import replacing_folder
from rlif_lightning.runs.curves import draw_curves, write_report
from rlif_lightning.runs.metrics_csv import MetricsCSV, read_metrics
from rlif_lightning.runs.pictures import save_figure
from rlif_lightning.runs.summary import summary_table
from tests.events import scalars


@pytest.fixture
def fit(rlif, small_fit, problems_file, capsys):
    """``fit(*settings)``: three steps; the exit code, what was said, and the run folder."""
    data = ["--data.val.path", problems_file, "--data.val.gold", r"[#]{4}\s*(.+)", "--evaluation.n=3"]
    often = ["--evaluation.every=0", "--trainer.max_steps=3", "--checkpoint.every=100", "--guard.action=warn"]

    def run(*settings):
        code = 0
        try:
            rlif("fit", *small_fit, *data, *often, *settings)
        except SystemExit as end:
            code = end.code
        found = sorted(Path("runs", "run").glob("*"), key=lambda p: int(p.name))
        return code, capsys.readouterr().err, found[-1].absolute() if found else None

    return run


def at_rollout(monkeypatch, number, do):
    """Do something before a rollout of a run, counted from 1; ``do`` gets the run folder and the policy's module."""
    collect, calls = RolloutCallback._collect, []

    def odd(self, trainer, module, batch):
        calls.append(1)
        if len(calls) == number:
            do(Path(trainer.log_dir), module)
        return collect(self, trainer, module, batch)

    monkeypatch.setattr(RolloutCallback, "_collect", odd)


def step_of(run):
    return read_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"]


def remove_run(run, module):
    shutil.rmtree(run)


def remove_checkpoints(run, module):
    shutil.rmtree(run / "checkpoints")


def folder_for_checkpoint(run, module):
    (run / "checkpoints" / "last.ckpt").unlink()
    (run / "checkpoints" / "last.ckpt").mkdir()


def file_for_checkpoints(run, module):
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").write_text("in the way")


def remove_table(run, module):
    (run / "metrics.csv").unlink()


def folder_for_table(run, module):
    remove_table(run, module)
    (run / "metrics.csv").mkdir()


def remove_events(run, module):
    for file in run.glob("events*"):
        file.unlink()


@pytest.mark.parametrize(
    ("do", "file"),
    [
        (remove_run, "metrics.csv"),
        (folder_for_checkpoint, "last.ckpt"),
        (file_for_checkpoints, "checkpoints"),
        (remove_table, "metrics.csv"),
        (folder_for_table, "metrics.csv"),
    ],
)
def test_files_that_vanish_in_mid_run(fit, monkeypatch, do, file):
    """What was trained is saved where it can be, and the file is named."""
    at_rollout(monkeypatch, 3, do)
    ended, said, run = fit()
    assert ended == 1 and f"{file} can't be written" in said, said
    if file == "metrics.csv":
        assert step_of(run) == 2 and "step 2 is saved: continue with --ckpt_path last" in said


@pytest.mark.parametrize("do", [remove_checkpoints, remove_events])
def test_files_that_come_again(fit, monkeypatch, do):
    at_rollout(monkeypatch, 3, do)
    ended, _, run = fit()
    assert ended == 0 and step_of(run) == 3


def test_an_extra_logger_that_fails_ends_nothing(fit, monkeypatch):
    """Neither while it logs nor when it ends."""

    def break_down(run, module):
        shutil.rmtree("extra")
        Path("extra").write_text("in the way")

    at_rollout(monkeypatch, 3, break_down)
    logger = ["--trainer.logger=lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir=extra"]
    with pytest.warns(UserWarning, match="CSVLogger has not logged everything: .*Not a directory"):
        ended, _, run = fit(*logger)
    assert ended == 0 and step_of(run) == 3 and (run / "summary.txt").exists()
    assert read_metrics(run / "metrics.csv")["rollout/reward"].keys() == {0, 1, 2}


def test_damaged_logs_are_refused_before_anything_is_written(fit):
    _, _, run = fit("--checkpoint.every=1")
    (run / "completions.jsonl").write_text("damaged\n")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    again = ["--trainer.max_steps=4", "--ckpt_path", run / "checkpoints" / "step=2.ckpt", "--guard.drop=0.3"]
    ended, said, _ = fit(*again)
    assert ended == 2 and "completions.jsonl cannot be cut back" in said
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert [path.name for path in before.keys() | after.keys() if before.get(path) != after.get(path)] == []


@pytest.mark.parametrize("damage", [b"\xff\xfe", b"a: [", b"- 1", b""])
def test_damaged_settings_end_no_resume(fit, damage, caplog):
    _, _, run = fit("--checkpoint.every=1", "--trainer.max_steps=2")
    for name in ("config.yaml", ".finished"):
        (run / name).write_bytes(damage)
    ended, _, _ = fit("--trainer.max_steps=3", "--ckpt_path=last")
    assert ended == 0 and step_of(run) == 3
    assert ("unknown, as config.yaml was damaged" in caplog.text) == bool(damage)


def test_a_clock_that_is_set_back(fit, monkeypatch):
    real = time.time
    at_rollout(monkeypatch, 2, lambda *_: monkeypatch.setattr(time, "time", lambda: real() - 86_400))
    ended, _, run = fit()
    assert ended == 0 and step_of(run) == 3
    assert list(scalars(run)["rollout/reward"]) == [0, 1, 2]


def test_a_reward_that_fails_costs_no_step(fit, monkeypatch):
    """A user's own code may fail late, on a completion that it did not expect."""
    calls, score = [], SelfCertainty.__call__

    def failing(self, rollout):
        calls.append(1)
        if len(calls) == 3:
            raise ZeroDivisionError
        return score(self, rollout)

    with monkeypatch.context() as patch:
        patch.setattr(SelfCertainty, "__call__", failing)
        with pytest.raises(ZeroDivisionError):
            fit()
    run = Path("runs/run/1")
    assert step_of(run) == 2
    assert fit("--ckpt_path=last")[0] == 0 and step_of(run) == 3


def test_a_reader_of_messages_that_goes_away_ends_nothing(small_fit, tmp_path):
    """As in ``rlif fit ... 2>&1 | tee log`` where tee is killed."""
    command = [sys.executable, "-m", "rlif_lightning", "fit", *small_fit, "--trainer.enable_progress_bar=true"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    process.stderr.readline()
    process.stderr.close()
    assert process.wait() == 0 and step_of(tmp_path / "runs" / "run" / "1") == 2


def test_nan_in_an_evaluation(fit, monkeypatch):
    """It is said, and the weights are not saved."""
    answer, calls = Evaluation._answer, []

    def damaged(self, trainer, module, *args):
        calls.append(1)
        if len(calls) == 3:
            with torch.no_grad():
                next(module.policy.model.parameters()).fill_(torch.nan)
        return answer(self, trainer, module, *args)

    monkeypatch.setattr(Evaluation, "_answer", damaged)
    ended, said, run = fit("--evaluation.every=1", "--checkpoint.every=1")
    assert ended == 2 and "training has diverged" in said and step_of(run) == 1


@pytest.mark.pictures
@pytest.mark.parametrize("name", ["a$b", r"a$\frac$", "a\nb", "\x1b[31mred", "--help", "日本", "a" * 200, "%s{0}"])
def test_odd_names_of_runs(tmp_path, name):
    run, other = tmp_path / name / "1", tmp_path / name / "2"
    run.mkdir(parents=True)
    MetricsCSV(run / "metrics.csv").log(0, {"rollout/reward": 1.0, "val/accuracy": 0.5})
    assert all(path.stat().st_size for path in write_report(run, summary_table(run)))
    shutil.copytree(run, other)
    draw_curves([run, other], tmp_path / "x.png")


ODD = {"\u0661": 4, "-1": 4, "0x10": 4, "1 ": 4, "\u00b2": 4, "0099": 100}


@pytest.mark.parametrize(("name", "number"), ODD.items())
def test_odd_names_in_the_folder_of_runs(tmp_path, name, number):
    (tmp_path / "r" / name).mkdir(parents=True)
    (tmp_path / "r" / "3").write_text("a file")
    (tmp_path / "r" / "loop").symlink_to(tmp_path / "r" / "loop")
    assert runs.next_run_folder(tmp_path, "r").name == str(number)
    assert runs.latest_run_folder(tmp_path, "r") is None


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EMFILE])
def test_no_process_for_the_grader(monkeypatch, number):
    def none(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(subprocess, "Popen", none)
    with pytest.raises(UserError, match=os.strerror(number)):
        Grader(AnswerFormat()).grade([(r"\boxed{x+1}", True, Gold("1+x"))])


def test_a_full_disk_leaves_a_folder_as_it_was(tmp_path):
    """As an export, or a mixture: SafetensorError has the system's error in its text only."""
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "old").write_text("old")
    for error in (OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error (os error 28)")):

        def fill(error=error):
            with replacing_folder(folder) as unfinished:
                (unfinished / "half").write_text("half")
                raise error

        with pytest.raises(DiskFailure, match=r"There is no room for .*/export\n.*MB are free"):
            fill()
        assert [p.name for p in tmp_path.rglob("*")] == ["export", "old"]


def test_a_full_disk_leaves_a_picture_as_it_was(tmp_path, monkeypatch):
    picture = tmp_path / "x.png"
    picture.write_text("old")

    def half(file, format):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    figure = Figure()
    monkeypatch.setattr(figure, "savefig", half)
    with pytest.raises(DiskFailure, match=r"x\.png\n"):
        save_figure(figure, picture)
    assert picture.read_text() == "old" and [*tmp_path.iterdir()] == [picture]
