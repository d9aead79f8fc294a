"""Full and broken disks, power cuts, damaged files: what is synced, found, said and gone on without."""

import errno
import os
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rlif_lightning.callbacks import completions
from rlif_lightning.errors import DiskFailure, UserError
from rlif_lightning.evaluation import results
from rlif_lightning.models.checkpoints import AtomicCheckpointIO, newest_whole, read_checkpoint
from rlif_lightning.models.trainable import load_trainable, save_trainable
from rlif_lightning.runs import curves
from rlif_lightning.runs.atomic import replacing, replacing_folder
from rlif_lightning.runs.folder import lock_run
from rlif_lightning.runs.metrics_csv import MetricsCSV, read_metrics
from tests.processes import used_by

FULL = OSError(errno.ENOSPC, "No space left on device")


def raising(error):
    def function(*_, **__):
        raise error

    return function


@pytest.fixture
def log(monkeypatch):
    """What is synced, by inode, and which names are replaced, in their order."""
    calls, fsync, replace = [], os.fsync, os.replace

    def noted_sync(handle):
        calls.append(os.fstat(handle).st_ino)
        fsync(handle)

    def noted_replace(source, target):
        calls.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "replace", noted_replace)
    return calls


@pytest.fixture
def umask():
    old = os.umask(0o022)
    yield
    os.umask(old)


# -- written so that a power cut costs nothing -------------------------------------------------------------------


def test_a_file_is_synced_before_its_name_and_the_name_afterwards(tmp_path, log):
    with replacing(tmp_path / "x") as file:
        file.write(b"x")
    assert log == [(tmp_path / "x").stat().st_ino, "x", tmp_path.stat().st_ino]


def test_the_file_that_safetensors_puts_in_place_is_the_one_that_is_synced(tmp_path, log, umask):
    path = tmp_path / "guard" / "weights.safetensors"
    save_trainable({"w": torch.ones(3)}, path, step=1)
    assert log == [path.stat().st_ino, path.name, path.parent.stat().st_ino]
    assert path.stat().st_mode & 0o777 == 0o644 and [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_folder_is_synced_and_others_may_read_it(tmp_path, log, umask):
    with replacing_folder(tmp_path / "export") as folder:
        save_file({"w": torch.ones(3)}, folder / "model.safetensors")
        assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o600
    stored = tmp_path / "export" / "model.safetensors"
    assert stored.stat().st_mode & 0o777 == 0o644
    assert log == [stored.stat().st_ino, tmp_path.stat().st_ino]


def test_logs_are_synced_before_the_checkpoint_that_refers_to_them(rlif, small_fit, log):
    run = rlif("fit", *small_fit, "--trainer.max_steps=1") / "runs" / "run" / "1"
    before = log[: len(log) - log[::-1].index("last.ckpt")]  # not that of the run's start
    assert {(run / name).stat().st_ino for name in ("metrics.csv", "completions.jsonl")} <= {*before}
    assert "config.yaml" in before


def test_what_a_killed_run_leaves_is_gone_at_the_next_start(tmp_path):
    guard = tmp_path / "checkpoints" / "guard"
    guard.mkdir(parents=True)
    left = [tmp_path / ".metrics.csv.new", guard.parent / ".last.ckpt.new", guard / ".tmpA1b2C3"]
    for path in [*left, guard / "weights.safetensors", tmp_path / ".tmp-of-mine"]:
        path.touch()
    lock_run(tmp_path).close()
    assert not any(path.exists() for path in left)
    assert (guard / "weights.safetensors").exists() and (tmp_path / ".tmp-of-mine").exists()


# -- damaged checkpoints -----------------------------------------------------------------------------------------


def damage(path, kind):
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as parts:
        part = max(parts.infolist(), key=lambda p: p.file_size)
        data = next(p for p in parts.infolist() if p.filename.endswith("data.pkl"))
    names = {n: int.from_bytes(content[n + 26 : n + 28], "little") for n in (part.header_offset, data.header_offset)}
    at = part.header_offset + 30 + names[part.header_offset] + 1000
    if kind == "a flipped bit":
        content[at] ^= 0x40
    elif kind == "a zeroed page":
        content[at : at + 4096] = bytes(4096)
    elif kind == "data.pkl":
        content[data.header_offset + 30 + names[data.header_offset] + 100] ^= 0x40
    elif kind == "half":
        content = content[: len(content) // 2]
    path.write_bytes(b"" if kind == "empty" else content)


@pytest.mark.parametrize("kind", ["a flipped bit", "a zeroed page", "data.pkl", "half", "empty"])
def test_a_damaged_checkpoint_is_found_and_the_newest_whole_one_named(tmp_path, kind):
    for step in (9, 12, 15):
        AtomicCheckpointIO().save_checkpoint(
            {"global_step": step, "w": torch.randn(5000)}, tmp_path / f"step={step}.ckpt"
        )
    last = tmp_path / "last.ckpt"
    os.link(tmp_path / "step=15.ckpt", last)
    assert newest_whole(last) == last and read_checkpoint(last)["global_step"] == 15
    damage(last, kind)  # under both names
    with pytest.raises(UserError, match=r"go back to a whole one beside it: .*step=12.ckpt, .*step=9.ckpt$"):
        read_checkpoint(last)
    with pytest.warns(UserWarning, match=r"last.ckpt is skipped: .*step=12.ckpt is taken instead"):
        assert newest_whole(last) == tmp_path / "step=12.ckpt"


def test_a_folder_in_place_of_a_checkpoint_is_refused_and_kept(rlif, small_fit, capsys):
    settings = [*small_fit, "--checkpoint.every=1", "--trainer.max_steps=2"]
    last = rlif("fit", *settings) / "runs" / "run" / "1" / "checkpoints" / "last.ckpt"
    last.unlink()
    last.mkdir()
    (last / "mine").touch()
    for asked, code in (("last", 2), (last.with_name("step=1.ckpt"), 1)):  # it can't be read; it can't be written
        with pytest.raises(SystemExit) as ended:
            rlif("fit", *settings, "--ckpt_path", asked)
        said = capsys.readouterr().err
        assert ended.value.code == code and "Is a directory" in said and "Traceback" not in said
        assert (last / "mine").exists()


def test_kept_weights_have_a_checksum_and_older_ones_are_read_without(tmp_path):
    path, weights = tmp_path / "w.safetensors", {"a": torch.randn(100).bfloat16(), "b": torch.tensor(1.0)}
    save_trainable(weights, path, step=3)
    assert load_trainable(path)[1] == {"step": "3"}
    content = bytearray(path.read_bytes())
    content[-60] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="not those that were written"):
        load_trainable(path)
    save_file(weights, path, {"step": "3"})
    assert load_trainable(path)[1] == {"step": "3"}


def test_last_goes_back_to_the_newest_whole_checkpoint(rlif, small_fit, capsys, recwarn):
    settings = [*small_fit, "--checkpoint.every=1", "--trainer.max_steps=3"]
    checkpoints = rlif("fit", *settings) / "runs" / "run" / "1" / "checkpoints"
    whole = {n: w.clone() for n, w in read_checkpoint(checkpoints / "last.ckpt")["state_dict"].items()}
    damage(checkpoints / "last.ckpt", "a flipped bit")  # step=3.ckpt is the same file
    (checkpoints.parent / "metrics.csv").write_bytes(b"")
    with pytest.raises(SystemExit):
        rlif("fit", *settings, "--ckpt_path", checkpoints / "last.ckpt")
    assert "step=2.ckpt" in capsys.readouterr().err
    rlif("fit", *settings, "--ckpt_path=last")
    said = " ".join(str(warning.message) for warning in recwarn)
    assert "last.ckpt is skipped" in said and "metrics.csv is empty: the rows of earlier steps are lost" in said
    again = read_checkpoint(checkpoints / "last.ckpt")["state_dict"]
    assert all(torch.equal(again[name], values) for name, values in whole.items())


@pytest.mark.parametrize("content", [b"", bytes(700)])
def test_an_empty_table_does_not_block_a_resume(tmp_path, content):
    path = tmp_path / "metrics.csv"
    path.write_bytes(content)
    MetricsCSV.truncate(path, 3)
    MetricsCSV(path).log(3, {"x": 1.0})
    assert read_metrics(path) == {"x": {3: 1.0}}


# -- full disks --------------------------------------------------------------------------------------------------


def test_a_file_that_a_full_disk_does_not_take_is_named(tmp_path):
    with pytest.raises(DiskFailure, match=r"^There is no room for .*/x\n") as failed, replacing(tmp_path / "x"):
        raise FULL
    assert "MB are free" in str(failed.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["completions", "metrics"])
def test_where_logging_fails_the_run_is_saved_before_it_ends(rlif, small_fit, capsys, recwarn, monkeypatch, name):
    settings = [*small_fit, "--trainer.max_steps=3"]
    with monkeypatch.context() as patch:
        if name == "completions":
            patch.setattr(completions, "append_rows", raising(FULL))
        else:
            patch.setattr(MetricsCSV, "log", raising(FULL))
        with pytest.raises(SystemExit) as ended:
            rlif("fit", *settings)
    said = capsys.readouterr().err
    assert ended.value.code == 1 and "step 1 is saved: continue with --ckpt_path last" in said, said
    assert "error: There is no room for" in said
    assert sum("Nothing more is logged" in str(warning.message) for warning in recwarn) == 1
    run = rlif("fit", *settings, "--ckpt_path=last") / "runs" / "run" / "1"
    assert read_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == 3


@pytest.mark.parametrize("command", ["validate", "predict"])
def test_what_was_graded_is_said_and_kept_where_the_disk_is_full(
    rlif, small_fit, tmp_path, capsys, caplog, monkeypatch, command
):
    source = "val" if command == "validate" else "predict"
    settings = [s.replace("data.train", f"data.{source}") for s in small_fit if "data.val" not in s]
    monkeypatch.setattr(results, "write_text", lambda path, text: raising(DiskFailure(path, errno.ENOSPC))())
    monkeypatch.setattr(results.tempfile, "mkdtemp", lambda prefix: str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        rlif(command, *used_by(command, settings))
    said = capsys.readouterr()
    rows = tmp_path / ("problems.jsonl" if command == "validate" else "predictions.jsonl")
    assert ended.value.code == 1 and f"what was graded is in {rows}" in said.err and rows.read_text().count("\n") > 1
    assert command == "predict" or "accuracy_sampled" in caplog.text


@pytest.mark.pictures
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FULL, "There is no room for"),
        (PermissionError(errno.EACCES, "Permission denied"), "a folder that can be written to"),
        (ValueError("Format 'xyz' is not supported"), "a file name that ends in .png"),
    ],
)
def test_a_picture_names_what_was_wrong(tmp_path, monkeypatch, error, said):
    class Figure:
        legends = texts = axes = ()
        savefig = staticmethod(raising(error))

    monkeypatch.setattr(curves, "curves_figure", lambda folders: Figure)
    with pytest.raises(UserError) as failed:
        curves.draw_curves([tmp_path], tmp_path / "x.png")
    assert said in str(failed.value)
    assert sum(text in str(failed.value) for text in ("no room", "a folder that can", "a file name")) == 1
