"""Checkpoint files: when they are written, what they hold, and what is refused."""

import argparse
import errno
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from lightning.pytorch import seed_everything
from safetensors import SafetensorError
from safetensors.torch import save_file
from tensorboard.summary.writer.record_writer import RecordWriter

from rlif_lightning.callbacks import RolloutCallback, RolloutCheckpoint
from rlif_lightning.callbacks.checkpoint import apply_changes, configuration
from rlif_lightning.errors import DiskFailure, UserError, disk_failure
from rlif_lightning.models.checkpoints import AtomicCheckpointIO, read_checkpoint
from rlif_lightning.runs import folder as runs
from rlif_lightning.training.module import RLIFModule
from tests.processes import MAIN, SAID, fork


def last(folder):
    return read_checkpoint(Path(folder) / "runs" / "run" / "1" / "checkpoints" / "last.ckpt")


def raising(error):
    """A function that raises."""

    def function(*_):
        raise error

    return function


def test_a_failed_write_leaves_the_file_before_whole(tmp_path, monkeypatch):
    path = tmp_path / "checkpoints" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"global_step": 1, "x": torch.ones(2)}, path)

    def full(checkpoint, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(DiskFailure, match="No space"):
        AtomicCheckpointIO().save_checkpoint({"global_step": 2}, path)
    assert read_checkpoint(path)["global_step"] == 1
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]


def test_nothing_is_written_outside_of_the_folder(tmp_path, monkeypatch):
    """Lightning writes to the system's temporary folder first; a full disk then costs the file before."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    AtomicCheckpointIO().save_checkpoint({"global_step": 2}, tmp_path / "last.ckpt")
    assert read_checkpoint(tmp_path / "last.ckpt") == {"global_step": 2}


def test_what_was_read_stays_when_the_file_is_replaced(tmp_path):
    """It is read from the disk as it is used; changes in place never reach the file."""
    io, path, values = AtomicCheckpointIO(), tmp_path / "last.ckpt", torch.arange(5000.0)
    io.save_checkpoint({"global_step": 1, "x": values}, path)
    read = io.load_checkpoint(path)
    io.load_checkpoint(path)["x"].zero_()
    assert torch.equal(read_checkpoint(path)["x"], values)
    io.save_checkpoint({"global_step": 2, "x": -values}, path)
    assert torch.equal(read["x"], values)


CHECKPOINTS = {
    "pickled object": ["can't be read", "could run any code"],
    "cut short": ["can't be read", "it was cut short"],
    "config.yaml": ["can't be read", "it is another kind of file"],
    "archive.npz": ["can't be read", "it is another kind of file"],
    "empty": ["can't be read", "the file is empty"],
    "other content": ["can't be read", "something else than the state of a training"],
    "another program's": ["was not written by rlif_lightning"],
    "a folder": ["The folder is no run", "--model.name"],
    "weights.safetensors": ["no weights that the collapse guard has kept", "--model.name"],
    "cut.safetensors": ["The weights can't be read", "--ckpt_path last"],
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_what_is_no_checkpoint_is_refused(rlif, small_fit, tmp_path, capsys, monkeypatch, kind):
    path = tmp_path / kind
    contents = {
        "pickled object": {"global_step": 1, "x": argparse.Namespace(a=1)},
        "another program's": {"global_step": 1},
    }
    torch.save(contents.get(kind, [1, 2]), path)
    if kind == "cut short":
        path.write_bytes(path.read_bytes()[:-200])
    elif kind in ("config.yaml", "empty", "cut.safetensors"):
        path.write_text("" if kind == "empty" else "seed_everything: 0\n")
    elif kind == "archive.npz":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.npy", "x")
    elif "folder" in kind:
        path.unlink()
        path.mkdir()
    elif kind == "weights.safetensors":
        save_file({"x": torch.ones(1)}, path)
    monkeypatch.setattr(RLIFModule, "configure_model", None)
    with pytest.raises(SystemExit) as ended:
        rlif("fit", *small_fit, "--ckpt_path", path)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert all(part in error for part in CHECKPOINTS[kind]) and len(error.splitlines()) <= 4, error


def test_weights_alone_are_not_continued(rlif, small_fit, tmp_path, capsys):
    """ModelCheckpoint writes such files if it is told to; the loops' state was looked for in them."""
    rlif("fit", *small_fit, "--trainer.max_steps=1")
    stored = last(tmp_path)
    torch.save({k: v for k, v in stored.items() if k not in ("optimizer_states", "loops")}, "weights.ckpt")
    with pytest.raises(SystemExit):
        rlif("fit", *small_fit, "--ckpt_path=weights.ckpt")
    assert "can't continue from weights alone" in capsys.readouterr().err


# -- two processes that write to one run -----------------------------------------------------------------------


def test_one_process_at_a_time_writes_to_a_run(rlif, small_fit, tmp_path, capsys):
    """The slower one's files were taken away by the faster one; a killed process leaves no lock behind."""
    settings = [*small_fit, "--ckpt_path=last", "--trainer.max_steps=2"]
    rlif("fit", *small_fit, "--trainer.max_steps=1")
    run = tmp_path / "runs" / "run" / "1"
    hold = "import pathlib, sys\nfrom rlif_lightning.runs.folder import lock_run\n"
    hold += "held = lock_run(pathlib.Path(sys.argv[1]))\n"
    with subprocess.Popen([sys.executable, "-c", hold + "print(flush=True)\nsys.stdin.read()", run],
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:  # fmt: skip
        other.stdout.readline()
        before = {f: f.read_bytes() for f in run.rglob("*") if f.is_file()}
        with pytest.raises(SystemExit) as ended:
            rlif("fit", *settings)
        assert ended.value.code == 2 and "Another process writes to this run" in capsys.readouterr().err
        assert before == {f: f.read_bytes() for f in run.rglob("*") if f.is_file()}
        other.kill()
    rlif("fit", *settings)
    assert last(tmp_path)["global_step"] == 2


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), None])
def test_file_systems_without_locks(tmp_path, monkeypatch, error):
    """And systems without fcntl."""
    if error is None:
        monkeypatch.setattr(runs, "fcntl", None)
    else:
        monkeypatch.setattr(runs.fcntl, "flock", raising(error))
    with runs.lock_run(tmp_path), runs.lock_run(tmp_path):
        pass


# -- a full disk -----------------------------------------------------------------------------------------------

FULL = Path("/dev/full")  # takes nothing, as a full disk does


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "There is no room for"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "The quota leaves no room for"),
        (OSError(errno.EROFS, "Read-only file system"), "The disk is read-only and does not take"),
        (OSError(errno.EIO, "Input/output error"), "The disk has failed to write"),
        (
            RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 355456 vs 355348"),
            "There is no room",
        ),
        (
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            "There is no room",
        ),
        (SafetensorError("Error while serializing: I/O error: Permission denied (os error 13)"), None),
        (OSError(errno.EACCES, "Permission denied"), None),
    ],
)
def test_what_a_bad_disk_raises(error, full):
    try:
        raise ValueError("on the way out") from error
    except ValueError as outer:
        said = disk_failure(outer, "runs/a/1")
    assert (said is not None) == (full is not None)
    if said is not None:
        text = str(said)
        assert text.startswith(full) and " runs/a/1\n" in text and "MB are free" in text and said.code == 1


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
@pytest.mark.parametrize("name", ["checkpoints/.last.ckpt.new", ".metrics.csv.new", "events"])
def test_a_full_disk_is_named_and_the_run_can_be_continued(rlif, small_fit, tmp_path, capsys, monkeypatch, name):
    rlif("fit", *small_fit, "--trainer.max_steps=1")
    run = tmp_path / "runs" / "run" / "1"
    path, before = run / name, last(tmp_path)
    settings = [*small_fit, "--ckpt_path=last", "--checkpoint.every=1"]
    with monkeypatch.context() as patch:
        if name == "events":
            patch.setattr(RecordWriter, "write", raising(OSError(errno.ENOSPC, "No space left")))
        else:
            lock = runs.lock_run  # takes away what a killed run has left behind
            patch.setattr(runs, "lock_run", lambda folder: (lock(folder), path.symlink_to(FULL))[0])
        with pytest.raises(SystemExit) as ended:
            rlif("fit", *settings)
    error = capsys.readouterr().err
    assert ended.value.code == 1 and f"error: There is no room for {run}" in error and "Traceback" not in error
    assert "step 1 is saved: continue with --ckpt_path last" in error
    assert last(tmp_path)["global_step"] == before["global_step"] == 1
    if path.is_symlink():
        path.unlink()
    rlif("fit", *settings)
    assert last(tmp_path)["global_step"] == 2


def test_only_trainable_weights_are_kept(rlif, small_fit):
    folder = rlif("fit", *small_fit, "--trainer.max_steps=1")
    names = set(last(folder)["state_dict"])
    assert names and all(n.startswith("model.") for n in names)  # the KL reference is a frozen copy
    rlif("fit", *small_fit, "--trainer.max_steps=1", "--model.lora={r: 2}", "--runs=lora")
    stored = read_checkpoint(folder / "lora" / "run" / "1" / "checkpoints" / "last.ckpt")
    assert stored["state_dict"] and all("lora_" in n for n in stored["state_dict"])


def test_a_save_waits_for_the_end_of_the_rollout(rlif, small_fit, monkeypatch):
    saved = []
    save = AtomicCheckpointIO.save_checkpoint

    def noted(self, checkpoint, path, storage_options=None):
        saved.append(checkpoint["global_step"])
        save(self, checkpoint, path, storage_options)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", noted)
    settings = ["--rollout.passes=4", "--checkpoint.every=3", "--checkpoint.keep=2", "--trainer.max_steps=12"]
    folder = rlif("fit", *small_fit, *settings)
    assert saved == [0, 4, 8, 12]
    checkpoints = folder / "runs" / "run" / "1" / "checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir()) == ["last.ckpt", "step=12.ckpt", "step=8.ckpt"]
    assert read_checkpoint(checkpoints / "step=8.ckpt")["global_step"] == 8


def test_file_systems_without_links(rlif, small_fit, monkeypatch):
    monkeypatch.setattr(os, "link", raising(PermissionError(1, "not permitted")))
    folder = rlif("fit", *small_fit, "--checkpoint.every=1", "--checkpoint.keep=1")
    checkpoints = folder / "runs" / "run" / "1" / "checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir()) == ["last.ckpt", "step=2.ckpt"]


def test_bad_settings():
    with pytest.raises(UserError, match="every"):
        RolloutCheckpoint(every=0)


def test_only_what_was_changed_is_brought_back():
    """An optimiser may keep its state next to its settings (schedule-free ones do): that stays as restored."""
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([weight], lr=0.5, weight_decay=0.25)
    now = configuration(optimizer)["groups"]
    optimizer.param_groups[0].update(lr=0.1, weight_decay=0.0, steps_so_far=7)
    was = [{**now[0], "lr": 0.125, "steps_so_far": 0}]
    now[0]["steps_so_far"] = 0
    assert apply_changes(optimizer, now, was) == ["lr 0.125 -> 0.5"]
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["steps_so_far"]) == (0.5, 0.0, 7)


def test_sigterm_saves_at_the_end_of_the_rollout_and_stops(rlif, small_fit, monkeypatch, caplog):
    """In the second of four updates of the second rollout: the run ends after the fourth, and continues exactly."""
    settings = [*small_fit, "--rollout.passes=4", "--trainer.max_steps=12", "--model.schedule=cosine"]
    whole = rlif("fit", *settings, "--runs=whole")
    before = signal.getsignal(signal.SIGTERM)
    start = RolloutCallback.on_train_batch_start

    def terminated(self, trainer, pl_module, batch, batch_idx):
        start(self, trainer, pl_module, batch, batch_idx)
        if batch_idx == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(RolloutCallback, "on_train_batch_start", terminated)
        with pytest.raises(SystemExit) as ended:
            rlif("fit", *settings)
    assert ended.value.code == 143
    assert last(whole)["global_step"] == 8
    assert "Stopped by SIGTERM after step 8; continue with --ckpt_path last" in caplog.text
    assert signal.getsignal(signal.SIGTERM) == before
    rlif("fit", *settings, "--ckpt_path=last")
    one = last(whole)["state_dict"]
    two = read_checkpoint(whole / "whole" / "run" / "1" / "checkpoints" / "last.ckpt")["state_dict"]
    assert all(torch.equal(one[n], two[n]) for n in two)
    texts = [(whole / runs / "run" / "1" / "completions.jsonl").read_bytes() for runs in ("runs", "whole")]
    assert texts[0] == texts[1]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_process_that_is_ended_leaves_a_checkpoint(small_fit, tmp_path, number):
    words = ["fit", *small_fit, "--checkpoint.every=1", "--trainer.max_steps=100000"]
    process = fork([MAIN, *words], tmp_path, dict(os.environ))
    path = tmp_path / "runs" / "run" / "1" / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 120
    while not [*path.parent.glob("step=*.ckpt")] and time.monotonic() < deadline and process.is_alive():
        time.sleep(0.1)
    os.kill(process.pid, number)
    process.join(600)
    errors = (tmp_path / SAID).read_text()
    assert process.exitcode == (-number if number == signal.SIGKILL else 128 + number), errors
    assert (f"Stopped by {number.name} after step" in errors) == (number != signal.SIGKILL)
    assert read_checkpoint(path)["global_step"] >= 1


def test_fit_twice_in_one_process_without_the_command_line(model_folder, problems_file, tmp_path):
    from lightning.pytorch import Trainer

    from rlif_lightning.data.module import PromptDataModule
    from rlif_lightning.data.problems import Source
    from rlif_lightning.training.module import RLIFModule

    def fit():
        seed_everything(0, verbose=False)
        module = RLIFModule(str(model_folder()))
        trainer = Trainer(
            accelerator="cpu",
            max_steps=2,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=tmp_path,
            callbacks=[RolloutCallback(2, 2, max_new_tokens=4), RolloutCheckpoint()],
        )
        source = Source(str(problems_file), prompt="question", answer=None)
        trainer.fit(module, datamodule=PromptDataModule(source, template="{prompt} "))
        return module.state_dict()

    one, two = fit(), fit()
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)
    assert read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 2
