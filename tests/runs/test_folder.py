import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from rlif_lightning.errors import UserError
from rlif_lightning.runs.atomic import replacing, truncate_jsonl
from rlif_lightning.runs.folder import find_checkpoint, latest_run_folder, next_run_folder, run_folder_of


def checkpoint(root, run, name="last.ckpt"):
    path = root / run / "checkpoints" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(run)
    return path


def test_runs_are_numbered_from_the_highest_and_as_numbers(tmp_path):
    root = tmp_path / "runs"
    assert next_run_folder(root, "a") == root / "a" / "1"
    (root / "a" / "9").mkdir()
    (root / "a" / "10").mkdir()
    (root / "a" / "notes").mkdir()
    (root / "a" / "12").write_text("a file takes its number too")
    assert next_run_folder(root, "a") == root / "a" / "13"
    assert next_run_folder(root, "b") == root / "b" / "1"
    assert (root / "a" / "13").is_dir()


def test_runs_started_together_get_different_folders(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: next_run_folder(tmp_path, "a"), range(40)))
    assert sorted(int(folder.name) for folder in folders) == list(range(1, 41))


def test_a_root_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be created[\s\S]*file/a[\s\S]*do: "):
        next_run_folder(tmp_path / "file", "a")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_root_is_an_error(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(UserError, match="Permission denied"):
        next_run_folder(tmp_path, "a")


def test_the_latest_run_is_the_newest_by_number_that_holds_a_checkpoint(tmp_path):
    assert latest_run_folder(tmp_path, "a") is None
    for n in ("2", "9", "10"):
        checkpoint(tmp_path, f"a/{n}")
    (tmp_path / "a" / "11" / "checkpoints").mkdir(parents=True)  # killed before its first checkpoint
    checkpoint(tmp_path, "b/99")
    assert latest_run_folder(tmp_path, "a") == tmp_path / "a" / "10"


def test_last_means_the_last_checkpoint_of_the_latest_run(tmp_path):
    for n in ("1", "2"):
        checkpoint(tmp_path, f"a/{n}")
        checkpoint(tmp_path, f"a/{n}", "step=5.ckpt")
    assert find_checkpoint("last", tmp_path, "a").read_text() == "a/2"
    assert find_checkpoint("last", tmp_path, "a").name == "last.ckpt"


def test_last_without_any_checkpoint_never_starts_from_scratch(tmp_path):
    """Stock Lightning warns and trains from scratch."""
    with pytest.raises(UserError, match="no run below"):
        find_checkpoint("last", tmp_path / "none", "a")
    checkpoint(tmp_path, "b/3")
    (tmp_path / "a" / "1").mkdir(parents=True)
    with pytest.raises(UserError, match=r"recipe 'a'[\s\S]*a/\*/checkpoints[\s\S]*b/3[\s\S]*do: "):
        find_checkpoint("last", tmp_path, "a")


def test_a_run_that_has_only_other_checkpoints_names_them(tmp_path):
    checkpoint(tmp_path, "a/1")
    checkpoint(tmp_path, "a/2", "step=5.ckpt")
    with pytest.raises(UserError, match=r"step=5\.ckpt"):
        find_checkpoint("last", tmp_path, "a")


def test_a_checkpoint_can_be_given_as_a_file_or_as_its_run(tmp_path):
    path = checkpoint(tmp_path, "a/1")
    assert find_checkpoint(str(path), tmp_path / "other", "x") == path
    assert find_checkpoint(str(tmp_path / "a" / "1"), tmp_path / "other", "x") == path
    with pytest.raises(UserError, match=r"does not exist[\s\S]*nix.ckpt[\s\S]*a/1"):
        find_checkpoint(str(tmp_path / "nix.ckpt"), tmp_path, "x")


def test_the_run_folder_of_a_checkpoint(tmp_path, monkeypatch):
    path = checkpoint(tmp_path, "a/1")
    assert run_folder_of(path) is None  # a folder of checkpoints that no run has made
    (tmp_path / "a" / "1" / "config.yaml").write_text("")
    assert run_folder_of(path) == tmp_path / "a" / "1"
    assert run_folder_of(path.parent / "guard" / "best.safetensors") == tmp_path / "a" / "1"
    assert run_folder_of(tmp_path / "a" / "1" / "config.yaml") is None
    monkeypatch.chdir(path.parent)
    assert run_folder_of("last.ckpt") == tmp_path / "a" / "1"


ROWS = [{"step": step, "text": f"é {i}"} for step in (0, 1, 2, 3) for i in range(2)]
LINES = [json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS]


def test_rows_from_the_repeated_step_on_are_cut(tmp_path):
    path = tmp_path / "completions.jsonl"
    path.write_text("".join(LINES), encoding="utf-8")
    truncate_jsonl(path, 2)
    assert path.read_text(encoding="utf-8") == "".join(LINES[:4])
    assert [p.name for p in tmp_path.iterdir()] == ["completions.jsonl"]


@pytest.mark.parametrize("cut", range(1, len(LINES[4].encode()) + 1))
def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path, cut):
    path = tmp_path / "completions.jsonl"
    path.write_bytes("".join(LINES[:4]).encode() + LINES[4].encode()[:cut])
    truncate_jsonl(path, 9)
    whole = cut >= len(LINES[4].encode()) - 1  # only the line's end is missing
    assert path.read_text(encoding="utf-8") == "".join(LINES[: 5 if whole else 4])


def test_a_damaged_line_in_the_middle_is_named_and_the_file_stays(tmp_path):
    path = tmp_path / "completions.jsonl"
    text = LINES[0] + '{"text": 1}\n' + LINES[1]
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="line 2"):
        truncate_jsonl(path, 1)
    assert path.read_text(encoding="utf-8") == text
    assert len(list(tmp_path.iterdir())) == 1


def test_no_completions_no_file(tmp_path):
    truncate_jsonl(tmp_path / "completions.jsonl", 3)
    assert not list(tmp_path.iterdir())


def half_written(path):
    with replacing(path) as file:
        file.write(b"half")
        raise RuntimeError


def test_a_failed_replacement_leaves_the_old_file(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(RuntimeError):
        half_written(path)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("x", "old")]


def test_an_evaluations_folder_holds_no_checkpoint(tmp_path):
    """It was taken for a sharded checkpoint and ended in a traceback."""
    folder = tmp_path / "a" / "2"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("x: 1")
    with pytest.raises(UserError, match="holds no checkpoint"):
        find_checkpoint(str(folder), tmp_path, "a")
